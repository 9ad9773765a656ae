// Attention of many queries to few keys, float32, heads as views of channels-last maps.
//
// A block of ROWS queries meets all keys at once: scores, softmax and the mean of the values never leave the first cache. Keys
// and values of a head are copied there once, keys (and in the backward pass values) also turned, so that 16 keys are one
// vector. The backward pass computes the weights again.
#include <cmath>

#include "vector.h"

namespace {

constexpr int ROWS = 4;

// All lanes joined by `join`, half with half.
template <typename Join>
inline float joined(V v, Join join) {
    typedef float V8 __attribute__((vector_size(32)));
    typedef float V4 __attribute__((vector_size(16)));
    V8 eight[2];
    std::memcpy(eight, &v, sizeof(v));
    eight[0] = join(eight[0], eight[1]);
    V4 four[2];
    std::memcpy(four, eight, sizeof(eight[0]));
    four[0] = join(four[0], four[1]);
    return join(join(four[0][0], four[0][1]), join(four[0][2], four[0][3]));
}

inline float sum(V v) {
    return joined(v, [](auto a, auto b) { return a + b; });
}

inline float largest(V v) {
    return joined(v, [](auto a, auto b) { return a > b ? a : b; });
}

// Where the numbers of a [B, M, L, D] view lie: strides in numbers; those of a head lie side by side.
struct View {
    int64_t image, head, token;
};

// The keys or values of one head in vectors, as they are and turned, filled up with zeros.
template <int D>
struct Tokens {
    int64_t count, blocks;
    std::vector<V> turned;  // [D][blocks]
    std::vector<V> rows;    // [count][D / LANES]
    V absent = {};          // of the last block: minus infinity where there is no token

    Tokens(const float* from, int64_t count, int64_t stride, bool turn = true)
        : count(count), blocks(ceil_div(count, LANES)), turned(turn ? D * blocks : 0, V{}), rows(count * (D / LANES)) {
        for (int64_t n = 0; n < count; ++n) std::memcpy(&rows[n * (D / LANES)], from + n * stride, D * sizeof(float));
        if (turn) {
            float* to = reinterpret_cast<float*>(turned.data());
            for (int64_t n = 0; n < count; ++n)
                for (int d = 0; d < D; ++d) to[d * blocks * LANES + n] = from[n * stride + d];
        }
        for (int64_t lane = count - (blocks - 1) * LANES; lane < LANES; ++lane) absent[lane] = -INFINITY;
    }
};

// out[r][n] = sum over d of of[r][d] * tokens[n][d]
template <int D>
inline void products(const float (*of)[D], const Tokens<D>& tokens, V* out) {
    const int64_t blocks = tokens.blocks;
    int64_t block = 0;
    const auto some = [&](auto width) {
        constexpr int WIDTH = decltype(width)::value;
        for (; block + WIDTH <= blocks; block += WIDTH) {
            V sums[ROWS][WIDTH] = {};
            for (int d = 0; d < D; ++d)
#pragma GCC unroll 4
                for (int w = 0; w < WIDTH; ++w) {
                    const V key = tokens.turned[d * blocks + block + w];
#pragma GCC unroll 4
                    for (int r = 0; r < ROWS; ++r) sums[r][w] += of[r][d] * key;
                }
            for (int r = 0; r < ROWS; ++r)
                for (int w = 0; w < WIDTH; ++w) out[r * blocks + block + w] = sums[r][w];
        }
    };
    some(std::integral_constant<int, 4>());
    some(std::integral_constant<int, 1>());
}

// Scores to weights that still lack their division: e^(score - largest). Returns what each row is to be multiplied by. Where no
// key is, `absent` is minus infinity, and the weight next to nothing. BLOCKS is the number of blocks where it is known.
template <int BLOCKS>
inline void softmax(V* scores, int64_t any_blocks, V absent, float scale, float* inverse) {
    const int64_t blocks = BLOCKS ? BLOCKS : any_blocks;
    for (int r = 0; r < ROWS; ++r) {
        V* row = scores + r * blocks;
        row[blocks - 1] += absent;
        V top = row[0];
        for (int64_t b = 1; b < blocks; ++b) top = row[b] > top ? row[b] : top;
        const float most = largest(top) * scale;
        V total = {};
        for (int64_t b = 0; b < blocks; ++b) {
            row[b] = exp(row[b] * scale - most);
            total += row[b];
        }
        inverse[r] = 1 / sum(total);
    }
}

inline void softmax(V* scores, int64_t blocks, V absent, float scale, float* inverse) {
    if (blocks == 4)  // 49 keys, those of a 224 px image
        softmax<4>(scores, blocks, absent, scale, inverse);
    else
        softmax<0>(scores, blocks, absent, scale, inverse);
}

// out[r] = sum over n of weights[r][n] * tokens[n]
template <int D>
inline void mean(const V* weights, const Tokens<D>& tokens, float (*out)[D]) {
    constexpr int WIDE = D / LANES;
    const float* of = reinterpret_cast<const float*>(weights);
    // Tokens by turns into two sums, so that an addition need not wait for the one before it.
    V sums[2][ROWS][WIDE] = {};
    const auto add = [&](int64_t n, V (*to)[WIDE]) {
#pragma GCC unroll 4
        for (int w = 0; w < WIDE; ++w) {
            const V token = tokens.rows[n * WIDE + w];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) to[r][w] += of[r * tokens.blocks * LANES + n] * token;
        }
    };
    int64_t n = 0;
    for (; n + 1 < tokens.count; n += 2) {
        add(n, sums[0]);
        add(n + 1, sums[1]);
    }
    if (n < tokens.count) add(n, sums[0]);
    for (int r = 0; r < ROWS; ++r)
        for (int w = 0; w < WIDE; ++w) sums[0][r][w] += sums[1][r][w];
    std::memcpy(out, sums[0], sizeof(sums[0]));
}

template <int D>
inline void gather(const float* from, int64_t stride, int64_t rows, float (*to)[D]) {
    for (int64_t r = 0; r < ROWS; ++r) std::memcpy(to[r], from + std::min(r, rows - 1) * stride, D * sizeof(float));
}

template <int D>
void forward(const float* q, View of_q, const float* k, View of_k, const float* v, View of_v, float* out, View of_out,
             int64_t batch, int64_t heads, int64_t queries, int64_t keys, int threads) {
    const float scale = 1 / std::sqrt(static_cast<float>(D));
    const int64_t chunk = 512, chunks = ceil_div(queries, chunk);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < batch * heads * chunks; ++task) {
        const int64_t image = task / (heads * chunks), head = task / chunks % heads, first = task % chunks * chunk;
        const Tokens<D> of_keys(k + image * of_k.image + head * of_k.head, keys, of_k.token);
        const Tokens<D> of_values(v + image * of_v.image + head * of_v.head, keys, of_v.token, false);
        std::vector<V> weights(ROWS * of_keys.blocks);
        const int64_t at = image * of_q.image + head * of_q.head, to = image * of_out.image + head * of_out.head;
        for (int64_t i = first; i < std::min(queries, first + chunk); i += ROWS) {
            const int64_t rows = std::min<int64_t>(ROWS, queries - i);
            alignas(64) float of[ROWS][D], result[ROWS][D];
            gather<D>(q + at + i * of_q.token, of_q.token, rows, of);
            products<D>(of, of_keys, weights.data());
            float inverse[ROWS];
            softmax(weights.data(), of_keys.blocks, of_keys.absent, scale, inverse);
            mean<D>(weights.data(), of_values, result);
            for (int r = 0; r < ROWS; ++r)
                for (int d = 0; d < D; ++d) result[r][d] *= inverse[r];
            for (int64_t r = 0; r < rows; ++r) std::memcpy(out + to + (i + r) * of_out.token, result[r], sizeof(result[r]));
        }
    }
}

template <int D>
void backward(const float* grad, View of_g, const float* q, View of_q, const float* k, View of_k, const float* v, View of_v,
              float* grad_q, View of_gq, float* grad_k, View of_gk, float* grad_v, View of_gv, int64_t batch, int64_t heads,
              int64_t queries, int64_t keys, int threads) {
    constexpr int WIDE = D / LANES;
    const float scale = 1 / std::sqrt(static_cast<float>(D));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t task = 0; task < batch * heads; ++task) {
        const int64_t image = task / heads, head = task % heads;
        const Tokens<D> of_keys(k + image * of_k.image + head * of_k.head, keys, of_k.token);
        const Tokens<D> of_values(v + image * of_v.image + head * of_v.head, keys, of_v.token);
        const int64_t blocks = of_keys.blocks;
        std::vector<V> weights(ROWS * blocks), slopes(ROWS * blocks), sum_k(keys * WIDE, V{}), sum_v(keys * WIDE, V{});
        for (int64_t i = 0; i < queries; i += ROWS) {
            const int64_t rows = std::min<int64_t>(ROWS, queries - i);
            alignas(64) float of[ROWS][D], slope[ROWS][D], result[ROWS][D];
            gather<D>(q + image * of_q.image + head * of_q.head + i * of_q.token, of_q.token, rows, of);
            gather<D>(grad + image * of_g.image + head * of_g.head + i * of_g.token, of_g.token, rows, slope);
            for (int64_t r = rows; r < ROWS; ++r) std::fill(slope[r], slope[r] + D, 0.f);  // rows that are not there
            products<D>(of, of_keys, weights.data());
            float inverse[ROWS];
            softmax(weights.data(), blocks, of_keys.absent, scale, inverse);
            products<D>(slope, of_values, slopes.data());
            for (int r = 0; r < ROWS; ++r) {
                V* weight = weights.data() + r * blocks;
                V* at = slopes.data() + r * blocks;
                V along = {};
                for (int64_t b = 0; b < blocks; ++b) {
                    weight[b] *= inverse[r];
                    along += weight[b] * at[b];
                }
                const float mean_slope = sum(along);
                for (int64_t b = 0; b < blocks; ++b) at[b] = weight[b] * (at[b] - mean_slope) * scale;
            }
            mean<D>(slopes.data(), of_keys, result);
            float* to = grad_q + image * of_gq.image + head * of_gq.head + i * of_gq.token;
            for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * of_gq.token, result[r], sizeof(result[r]));
            const float* weight = reinterpret_cast<const float*>(weights.data());
            const float* at = reinterpret_cast<const float*>(slopes.data());
            V query[ROWS][WIDE], change[ROWS][WIDE];
            std::memcpy(query, of, sizeof(of));
            std::memcpy(change, slope, sizeof(slope));
            for (int64_t n = 0; n < keys; ++n)
#pragma GCC unroll 4
                for (int w = 0; w < WIDE; ++w) {
                    V key = sum_k[n * WIDE + w], value = sum_v[n * WIDE + w];
#pragma GCC unroll 4
                    for (int r = 0; r < ROWS; ++r) {
                        key += at[r * blocks * LANES + n] * query[r][w];
                        value += weight[r * blocks * LANES + n] * change[r][w];
                    }
                    sum_k[n * WIDE + w] = key;
                    sum_v[n * WIDE + w] = value;
                }
        }
        for (int64_t n = 0; n < keys; ++n) {
            const int64_t size = D * sizeof(float);
            std::memcpy(grad_k + image * of_gk.image + head * of_gk.head + n * of_gk.token, &sum_k[n * WIDE], size);
            std::memcpy(grad_v + image * of_gv.image + head * of_gv.head + n * of_gv.token, &sum_v[n * WIDE], size);
        }
    }
}

View view_of(const int64_t* strides) { return {strides[0], strides[1], strides[2]}; }

}  // namespace

#define FOR_DEPTH(depth, CALL) \
    switch (depth) {           \
        case 16: CALL(16);     \
        case 32: CALL(32);     \
        case 64: CALL(64);     \
        default: return 1;     \
    }

extern "C" {

// Sizes: B, M, L, N. Strides of a view: image, head, token.
int attention_forward(const float* q, const float* k, const float* v, float* out, int64_t depth, const int64_t* sizes,
                      const int64_t* of_q, const int64_t* of_k, const int64_t* of_v, const int64_t* of_out, int threads) {
#define CALL(D)                                                                                                         \
    forward<D>(q, view_of(of_q), k, view_of(of_k), v, view_of(of_v), out, view_of(of_out), sizes[0], sizes[1], sizes[2], \
               sizes[3], threads);                                                                                      \
    return 0
    FOR_DEPTH(depth, CALL)
#undef CALL
}

int attention_grad(const float* grad, const float* q, const float* k, const float* v, float* grad_q, float* grad_k,
                   float* grad_v, int64_t depth, const int64_t* sizes, const int64_t* of_grad, const int64_t* of_q,
                   const int64_t* of_k, const int64_t* of_v, const int64_t* of_grad_q, const int64_t* of_grad_k,
                   const int64_t* of_grad_v, int threads) {
#define CALL(D)                                                                                                 \
    backward<D>(grad, view_of(of_grad), q, view_of(of_q), k, view_of(of_k), v, view_of(of_v), grad_q,           \
                view_of(of_grad_q), grad_k, view_of(of_grad_k), grad_v, view_of(of_grad_v), sizes[0], sizes[1], \
                sizes[2], sizes[3], threads);                                                                   \
    return 0
    FOR_DEPTH(depth, CALL)
#undef CALL
}
}
