// Sixteen float32 at a time, in the compiler's own vector type: one AVX-512 register, two of AVX2, four of SSE or NEON.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

constexpr int LANES = 16;
typedef float V __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t I __attribute__((vector_size(LANES * sizeof(int32_t))));

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The first `lanes` numbers from `from`, zero after them; all of them where FULL.
template <bool FULL>
inline V load(const float* from, int lanes) {
    V v = {};
    if (FULL)
        std::memcpy(&v, from, sizeof(V));
    else
        std::memcpy(&v, from, lanes * sizeof(float));
    return v;
}

template <bool FULL>
inline void store(float* to, V v, int lanes) {
    std::memcpy(to, &v, FULL ? sizeof(V) : lanes * sizeof(float));
}
