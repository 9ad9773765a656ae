"""Operations that a library call does not make fast enough: each file holds the plain definition in torch, which says
what is computed, and knows the kernels of ours that compute the same."""
