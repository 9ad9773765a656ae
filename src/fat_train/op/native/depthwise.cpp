// Depth-wise convolution of channels-last float32 maps: forward, input gradient, weight gradient.
//
// A vector holds 16 channels of one pixel. The forward pass keeps a tile of output pixels in registers and slides over the input
// pixels of a kernel row: each is loaded once and multiplied into every output that it reaches. The weight gradient keeps the
// taps in registers instead. Work is split by image and row, or by image and channels, never by the number of threads, and
// partial sums are added in a fixed order: the result does not depend on how many threads there are.
#include "vector.h"

namespace {

// Channels of a row whose sums stay in the first cache from one row to the next.
constexpr int64_t GROUP = 8 * LANES;

// Weights as [channel block][tap][LANES], zero beyond the last channel, so that a tap's 16 channels are one load.
std::vector<V> packed_weights(const float* weight, int64_t channels, int taps, bool flipped) {
    const int64_t blocks = ceil_div(channels, LANES);
    std::vector<V> packed(blocks * taps);
    for (int64_t c = 0; c < blocks * LANES; ++c)
        for (int tap = 0; tap < taps; ++tap)
            packed[c / LANES * taps + tap][c % LANES] =
                c < channels ? weight[c * taps + (flipped ? taps - 1 - tap : tap)] : 0.f;
    return packed;
}

struct Map {
    int64_t channels, in_height, in_width, out_height, out_width;
};

// The K input rows that reach output row i of an image; null outside the map.
template <int K, int S>
inline void input_rows(const float* x, int64_t image, int64_t i, const Map& map, const float** rows) {
    for (int u = 0; u < K; ++u) {
        const int64_t row = i * S + u - K / 2;
        const bool outside = row < 0 || row >= map.in_height;
        rows[u] = outside ? nullptr : x + (image * map.in_height + row) * map.in_width * map.channels;
    }
}

// One tile: outputs [column, column + T) of a row, 16 channels. `rows` are the K input rows, null outside the map.
template <int K, int S, int T, bool FULL>
inline void forward_tile(const float* const* rows, const V* weights, V start, const Map& map, int64_t column, int64_t c,
                         int lanes, float* out, bool residual) {
    constexpr int REACH = (T - 1) * S + K;
    V sums[T];
    for (int t = 0; t < T; ++t) sums[t] = start;
    const int64_t first = column * S - K / 2;
    const bool inside = first >= 0 && first + REACH <= map.in_width;
    for (int u = 0; u < K; ++u) {
        const float* row = rows[u];
        if (row == nullptr) continue;
        const V* taps = weights + u * K;
        row += first * map.channels + c;
#pragma GCC unroll 32
        for (int i = 0; i < REACH; ++i) {
            if (!inside && (first + i < 0 || first + i >= map.in_width)) continue;
            const V pixel = load<FULL>(row + i * map.channels, lanes);
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) {
                const int v = i - t * S;
                if (v >= 0 && v < K) sums[t] += pixel * taps[v];
            }
        }
    }
    const int64_t count = std::min<int64_t>(T, map.out_width - column);
    for (int t = 0; t < count; ++t) {
        if (residual) sums[t] += load<FULL>(rows[K / 2] + (column + t) * map.channels + c, lanes);
        store<FULL>(out + (column + t) * map.channels + c, sums[t], lanes);
    }
}

template <int K, int S, int T>
void forward_map(const float* x, const float* weight, const float* bias, float* y, int64_t batch, const Map& map,
                 bool residual, bool flipped, int threads) {
    const std::vector<V> weights = packed_weights(weight, map.channels, K * K, flipped);
    const int64_t out_row = map.out_width * map.channels;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < batch * map.out_height; ++task) {
        const int64_t image = task / map.out_height, i = task % map.out_height;
        const float* rows[K];
        input_rows<K, S>(x, image, i, map, rows);
        float* out = y + task * out_row;
        for (int64_t c = 0; c < map.channels; c += LANES) {
            const int lanes = std::min<int64_t>(LANES, map.channels - c);
            const V start = bias == nullptr ? V{} : load<false>(bias + c, lanes);
            const V* taps = weights.data() + c / LANES * K * K;
            for (int64_t column = 0; column < map.out_width; column += T)
                if (lanes == LANES)
                    forward_tile<K, S, T, true>(rows, taps, start, map, column, c, lanes, out, residual);
                else
                    forward_tile<K, S, T, false>(rows, taps, start, map, column, c, lanes, out, residual);
        }
    }
}

// Input gradient at stride 2: the input pixels of a tile gather from the output pixels that they reached. A tile begins at an
// even column, so which tap joins which two pixels is known when this is compiled.
template <int K, bool FULL>
inline void scatter_tile(const float* const* rows, const V* weights, const Map& map, int64_t column, int64_t c,
                         int lanes, float* out) {
    constexpr int T = 8, P = K / 2;
    constexpr int LOW = -((K - 1 - P) / 2), HIGH = (T - 1 + P) / 2;
    V sums[T] = {};
    for (int u = 0; u < K; ++u) {
        if (rows[u] == nullptr) continue;
        const V* taps = weights + u * K;
#pragma GCC unroll 32
        for (int d = LOW; d <= HIGH; ++d) {
            const int64_t j = column / 2 + d;
            if (j < 0 || j >= map.out_width) continue;
            const V pixel = load<FULL>(rows[u] + j * map.channels + c, lanes);
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) {
                const int v = t + P - 2 * d;
                if (v >= 0 && v < K) sums[t] += pixel * taps[v];
            }
        }
    }
    const int64_t count = std::min<int64_t>(T, map.in_width - column);
    for (int t = 0; t < count; ++t) store<FULL>(out + (column + t) * map.channels + c, sums[t], lanes);
}

template <int K>
void scatter_map(const float* grad, const float* weight, float* grad_x, int64_t batch, const Map& map, int threads) {
    const std::vector<V> weights = packed_weights(weight, map.channels, K * K, false);
    const int64_t in_row = map.in_width * map.channels, out_row = map.out_width * map.channels;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < batch * map.in_height; ++task) {
        const int64_t image = task / map.in_height, y = task % map.in_height;
        const float* rows[K];
        for (int u = 0; u < K; ++u) {
            const int64_t twice = y + K / 2 - u;
            const bool reached = twice >= 0 && twice % 2 == 0 && twice / 2 < map.out_height;
            rows[u] = reached ? grad + (image * map.out_height + twice / 2) * out_row : nullptr;
        }
        float* out = grad_x + task * in_row;
        for (int64_t c = 0; c < map.channels; c += LANES) {
            const int lanes = std::min<int64_t>(LANES, map.channels - c);
            const V* taps = weights.data() + c / LANES * K * K;
            for (int64_t column = 0; column < map.in_width; column += 8)
                if (lanes == LANES)
                    scatter_tile<K, true>(rows, taps, map, column, c, lanes, out);
                else
                    scatter_tile<K, false>(rows, taps, map, column, c, lanes, out);
        }
    }
}

// U kernel rows of the weight gradient over one row of output pixels, 16 channels.
template <int K, int S, int U, bool FULL>
inline void weight_row(const float* const* rows, const float* grad, const Map& map, int64_t c, int lanes, V* into) {
    constexpr int T = U * K > 20 ? 3 : 4, REACH = (T - 1) * S + K;
    V sums[U][K];
    for (int u = 0; u < U; ++u)
        for (int v = 0; v < K; ++v) sums[u][v] = into[u * K + v];
    for (int64_t column = 0; column < map.out_width; column += T) {
        V of[T];
        for (int t = 0; t < T; ++t)
            of[t] = column + t < map.out_width ? load<FULL>(grad + (column + t) * map.channels + c, lanes) : V{};
        const int64_t first = column * S - K / 2;
        const bool inside = first >= 0 && first + REACH <= map.in_width;
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) {
            if (rows[u] == nullptr) continue;
            const float* row = rows[u] + first * map.channels + c;
#pragma GCC unroll 32
            for (int i = 0; i < REACH; ++i) {
                if (!inside && (first + i < 0 || first + i >= map.in_width)) continue;
                const V pixel = load<FULL>(row + i * map.channels, lanes);
#pragma GCC unroll 16
                for (int t = 0; t < T; ++t) {
                    const int v = i - t * S;
                    if (v >= 0 && v < K) sums[u][v] += pixel * of[t];
                }
            }
        }
    }
    for (int u = 0; u < U; ++u)
        for (int v = 0; v < K; ++v) into[u * K + v] = sums[u][v];
}

// All kernel rows from FIRST on, as many at once as there are registers for; then the bias.
template <int K, int S, int FIRST, bool FULL>
inline void weight_rows(const float* const* rows, const float* grad, const Map& map, int64_t c, int lanes, V* into) {
    if constexpr (FIRST < K) {
        constexpr int LEFT = K - FIRST, U = K <= 5 ? K : LEFT == 4 ? 2 : std::min(LEFT, 3);
        weight_row<K, S, U, FULL>(rows + FIRST, grad, map, c, lanes, into + FIRST * K);
        weight_rows<K, S, FIRST + U, FULL>(rows, grad, map, c, lanes, into);
    } else {
        V sum = {};
        for (int64_t j = 0; j < map.out_width; ++j) sum += load<FULL>(grad + j * map.channels + c, lanes);
        into[K * K] += sum;
    }
}

template <int K, int S>
void weight_map(const float* x, const float* grad, float* grad_weight, float* grad_bias, int64_t batch, const Map& map, int threads) {
    constexpr int TAPS = K * K;
    const int64_t blocks = ceil_div(map.channels, LANES), per_group = GROUP / LANES, groups = ceil_div(blocks, per_group);
    const int64_t parts = std::min<int64_t>(batch, 16);  // of the batch, each summed by itself
    const int64_t out_row = map.out_width * map.channels;
    std::vector<V> partial(parts * blocks * (TAPS + 1), V{});
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < parts * groups; ++task) {
        const int64_t part = task / groups, group = task % groups;
        const int64_t last_block = std::min(blocks, (group + 1) * per_group);
        for (int64_t image = part * batch / parts; image < (part + 1) * batch / parts; ++image)
            for (int64_t i = 0; i < map.out_height; ++i) {
                const float* rows[K];
                input_rows<K, S>(x, image, i, map, rows);
                const float* of = grad + (image * map.out_height + i) * out_row;
                for (int64_t block = group * per_group; block < last_block; ++block) {
                    const int64_t c = block * LANES;
                    const int lanes = std::min<int64_t>(LANES, map.channels - c);
                    V* into = partial.data() + (part * blocks + block) * (TAPS + 1);
                    if (lanes == LANES)
                        weight_rows<K, S, 0, true>(rows, of, map, c, lanes, into);
                    else
                        weight_rows<K, S, 0, false>(rows, of, map, c, lanes, into);
                }
            }
    }
    for (int64_t c = 0; c < map.channels; ++c)
        for (int tap = 0; tap <= TAPS; ++tap) {
            float sum = 0;
            for (int64_t part = 0; part < parts; ++part)
                sum += partial[(part * blocks + c / LANES) * (TAPS + 1) + tap][c % LANES];
            (tap < TAPS ? grad_weight[c * TAPS + tap] : grad_bias[c]) = sum;
        }
}

template <int K>
void forward_any(const float* x, const float* weight, const float* bias, float* y, int64_t batch, const Map& map, int64_t stride,
                 bool residual, bool flipped, int threads) {
    // Tiles of 7 fit the maps of 224 px images (56, 28, 14, 7), tiles of 8 those of 256.
    const bool by_seven = ceil_div(map.out_width, 7) * 7 < ceil_div(map.out_width, 8) * 8;
    if (stride == 1)
        (by_seven ? forward_map<K, 1, 7> : forward_map<K, 1, 8>)(x, weight, bias, y, batch, map, residual, flipped, threads);
    else
        (by_seven ? forward_map<K, 2, 7> : forward_map<K, 2, 8>)(x, weight, bias, y, batch, map, residual, flipped, threads);
}

Map map_of(const int64_t* sizes, int64_t stride) {
    return {sizes[1], sizes[2], sizes[3], ceil_div(sizes[2], stride), ceil_div(sizes[3], stride)};
}

}  // namespace

#define FOR_KERNEL(k, CALL)  \
    switch (k) {             \
        case 3: CALL(3);     \
        case 5: CALL(5);     \
        case 7: CALL(7);     \
        case 9: CALL(9);     \
        default: return 1;   \
    }

extern "C" {

// Sizes: B, C, H, W of the input.
int depthwise_forward(const float* x, const float* weight, const float* bias, float* y, const int64_t* sizes, int64_t kernel,
                      int64_t stride, int64_t residual, int threads) {
    const int64_t batch = sizes[0];
    const Map map = map_of(sizes, stride);
#define CALL(K) forward_any<K>(x, weight, bias, y, batch, map, stride, residual, false, threads); return 0
    FOR_KERNEL(kernel, CALL)
#undef CALL
}

// At stride 1 a convolution of the gradient with the kernel turned by half a circle.
int depthwise_input_grad(const float* grad, const float* weight, float* grad_x, const int64_t* sizes,
                         int64_t kernel, int64_t stride, int64_t residual, int threads) {
    const int64_t batch = sizes[0];
    const Map map = map_of(sizes, stride);
#define CALL(K)                                                                             \
    if (stride == 1)                                                                        \
        forward_any<K>(grad, weight, nullptr, grad_x, batch, map, 1, residual, true, threads);       \
    else                                                                                    \
        scatter_map<K>(grad, weight, grad_x, batch, map, threads);                                   \
    return 0
    FOR_KERNEL(kernel, CALL)
#undef CALL
}

int depthwise_weight_grad(const float* x, const float* grad, float* grad_weight, float* grad_bias, const int64_t* sizes,
                          int64_t kernel, int64_t stride, int threads) {
    const int64_t batch = sizes[0];
    const Map map = map_of(sizes, stride);
#define CALL(K)                                                                     \
    if (stride == 1)                                                                \
        weight_map<K, 1>(x, grad, grad_weight, grad_bias, batch, map, threads);              \
    else                                                                            \
        weight_map<K, 2>(x, grad, grad_weight, grad_bias, batch, map, threads);              \
    return 0
    FOR_KERNEL(kernel, CALL)
#undef CALL
}
}
