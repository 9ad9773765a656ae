// Sixteen float32 at a time, in the compiler's own vector type: one AVX-512 register, two of AVX2, four of SSE or NEON.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
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

// e^x for x <= 0 to about 2 units in the last place; 0 below -87.
inline V exp(V x) {
    const V floor = V{} - 87.3f;
    x = x < floor ? floor : x;
    const V shifted = x * 1.44269504f + 12582912.f;  // + 1.5 * 2^23 rounds to the nearest whole number
    const V whole = shifted - 12582912.f;
    const V r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    const I power = (__builtin_convertvector(whole, I) + 127) << 23;
    V scale;
    std::memcpy(&scale, &power, sizeof(V));
    return p * scale;
}
