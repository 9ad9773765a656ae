// FASA's gates and their product on float32 maps: one pass over memory forward, one backward.
#include "vector.h"

namespace {

constexpr int64_t CHUNK = 1 << 14;  // numbers that a thread takes at a time

template <typename Each>
void over(int64_t count, int threads, Each each) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < count; first += CHUNK) {
        const int64_t last = std::min(count, first + CHUNK);
        int64_t i = first;
        for (; i + LANES <= last; i += LANES) each(i, std::true_type(), LANES);
        if (i < last) each(i, std::false_type(), static_cast<int>(last - i));
    }
}

inline V sigmoid(V x) {
    const V e = exp(x < 0 ? x : -x);
    const V whole = 1.f / (1.f + e);
    return x < 0 ? e * whole : whole;
}

}  // namespace

extern "C" {

int interaction_forward(const float* q_prime, const float* global, float* y, int64_t both_ways, int64_t count, int threads) {
    over(count, threads, [=](int64_t i, auto full, int lanes) {
        constexpr bool FULL = decltype(full)::value;
        const V q = load<FULL>(q_prime + i, lanes), g = load<FULL>(global + i, lanes);
        const V local = q * sigmoid(q);
        const V product = g * sigmoid(g) * local;
        store<FULL>(y + i, both_ways ? product * sigmoid(local) : product, lanes);
    });
    return 0;
}

int interaction_grad(const float* grad, const float* q_prime, const float* global, float* grad_q, float* grad_g,
                     int64_t both_ways, int64_t count, int threads) {
    over(count, threads, [=](int64_t i, auto full, int lanes) {
        constexpr bool FULL = decltype(full)::value;
        const V slope = load<FULL>(grad + i, lanes), q = load<FULL>(q_prime + i, lanes), g = load<FULL>(global + i, lanes);
        const V gate_q = sigmoid(q), gate_g = sigmoid(g);
        const V local = q * gate_q, other = g * gate_g;
        const V third = both_ways ? sigmoid(local) : V{} + 1.f;
        const V by_local = other * (third + local * third * (1.f - third));
        store<FULL>(grad_q + i, slope * by_local * gate_q * (1.f + q * (1.f - gate_q)), lanes);
        store<FULL>(grad_g + i, slope * local * third * gate_g * (1.f + g * (1.f - gate_g)), lanes);
    });
    return 0;
}
}
