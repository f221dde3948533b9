// How the CUDA kernels of bn_leaky_relu share out a tensor: tiles of channels, slabs of rows, rows of threads;
// and how what the threads of a tile found is merged, always in the same order.
#pragma once
#include "cuda_common.cuh"

namespace dcgan {
constexpr int kTile = 32;  // channels of a block in channels_last; in NCHW a block has one channel

// Where the data lie, and which part of them a block owns. A group is contiguous in both layouts.
struct Split {
  int64_t channels, inner;           // inner: H * W in NCHW, 1 in channels_last
  int64_t group_size, count;         // values of a group; of one channel in it
  int64_t rows, slab_rows;           // rows of a group; of a slab (the last may have fewer)
  int64_t samples[3];                // offsets of the first, middle and last value of a group's channel 0
  int tiles, slabs, groups;          // tiles * slabs * groups blocks

  __device__ int64_t place(int64_t group, int64_t slab, int64_t channel) const {  // of a partial result
    return (group * slabs + slab) * channels + channel;
  }
};

// The rows of one thread. `each` hands them out kBatch at a time, so that their loads are in flight together.
template <int V, bool kLast>
struct Thread {
  static constexpr int kAcross = kLast ? kTile / V : 1;  // threads side by side on a row
  static constexpr int kDown = kThreads / kAcross;       // rows that the block reads at once
  int tile, slab, group, warp, lane;
  int64_t channel;                                       // the first of this thread's
  int64_t offset, left, step;                            // of the next row; rows to come; from row to row
  int64_t column, column_step, columns, wrap;            // NCHW: place in the picture, in vectors

  __device__ explicit Thread(const Split& s) : warp(threadIdx.x / kLanes), lane(threadIdx.x % kLanes) {
    tile = blockIdx.x % s.tiles;
    slab = blockIdx.x / s.tiles % s.slabs;
    group = blockIdx.x / s.tiles / s.slabs;
    int64_t row = slab * s.slab_rows + threadIdx.x / kAcross;
    int64_t end = min((slab + 1) * s.slab_rows, s.rows);
    channel = kLast ? int64_t(tile) * kTile + place_in_tile(0) : tile;
    left = channel < s.channels && row < end ? (end - row + kDown - 1) / kDown : 0;
    columns = s.inner / V;
    column = kLast ? 0 : row % columns;
    column_step = kLast ? 0 : kDown % columns;
    int64_t picture = s.channels * s.inner;
    offset = group * s.group_size +
             (kLast ? row * s.channels + channel
                    : row / columns * picture + channel * s.inner + column * V);
    step = kLast ? kDown * s.channels : kDown / columns * picture + column_step * V;
    wrap = picture - s.inner;
  }
  // Lane l of warp 0 has the merged results and the parameters of channel l of the tile.
  __device__ int64_t led_channel() const { return kLast ? int64_t(tile) * kTile + lane : tile; }
  __device__ bool leads(const Split& s) const {
    return warp == 0 && lane < (kLast ? kTile : 1) && led_channel() < s.channels;
  }
  __device__ int place_in_tile(int e) const { return kLast ? threadIdx.x % kAcross * V + e : 0; }
  __device__ void next() {
    offset += step;
    if (kLast) return;
    column += column_step;
    if (column >= columns) {
      column -= columns;
      offset += wrap;
    }
  }
  template <int kBatch, typename F>
  __device__ void each(const F& f) {  // f(offsets, how many of them are valid)
    for (; left > 0; left -= kBatch) {
      int64_t at[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i, next()) at[i] = offset;
      f(at, int(min(left, int64_t(kBatch))));
    }
  }
};

template <int V, typename T, int kBatch>
__device__ void load_batch(const T* from, const int64_t (&at)[kBatch], int valid,
                           Vector<T, V> (&rows)[kBatch]) {
#pragma unroll
  for (int i = 0; i < kBatch; ++i)
    if (i < valid) rows[i] = load<V>(from + at[i]);
}
// Merges the V results of every thread of a block into one per channel of its tile, as merge_warps does.
template <int V, bool kLast, typename P>
__device__ P merge_block(P (&mine)[V]) {
  constexpr int kAcross = Thread<V, kLast>::kAcross, kChannels = kLast ? kTile : 1, kOwn = kLast ? V : 1;
  __shared__ P slots[kWarps][kChannels];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int e = kOwn; e < V; ++e) merge(mine[0], mine[e]);
  for (int e = 0; e < kOwn; ++e) {
    for (int mask = kAcross; mask < kLanes; mask *= 2) merge(mine[e], shuffle(mine[e], mask));
    if (lane < kAcross) slots[warp][lane * kOwn + e] = mine[e];
  }
  __syncwarp();
  return merge_warps(lane < kChannels ? slots[warp][lane] : P{}, slots);
}
// Merges the partial results of all slabs of a group, as merge_warps does.
template <bool kLast, typename P>
__device__ P merge_slabs(const P* partial, const Split& s, int tile, int group) {
  constexpr int kChannels = kLast ? kTile : 1;
  __shared__ P slots[kWarps][kChannels];
  const int64_t channel = int64_t(tile) * kChannels + threadIdx.x % kLanes;
  P mine{};
  if (threadIdx.x % kLanes < kChannels && channel < s.channels)
    for (int slab = threadIdx.x / kLanes; slab < s.slabs; slab += kWarps)
      merge(mine, partial[s.place(group, slab, channel)]);
  return merge_warps(mine, slots);
}

template <typename A>
struct Affine {
  A mean, scale, bias;
  __device__ A operator()(A distance) const { return fma(distance, scale, bias); }  // z, in both directions
};
// A value near those of each of V channels: the median of three, so that it is no single outlier.
template <int V, typename T>
__device__ Vector<wide_t<T>, V> typical(const Split& s, const T* x, int64_t group, int64_t channel) {
  const T* from = x + group * s.group_size + channel * s.inner;
  const auto first = load<V>(from + s.samples[0]), middle = load<V>(from + s.samples[1]);
  const auto last = load<V>(from + s.samples[2]);
  Vector<wide_t<T>, V> median;
  for (int e = 0; e < V; ++e) {
    const wide_t<T> a = first.at[e], b = middle.at[e], c = last.at[e];
    median.at[e] = max(min(a, b), min(max(a, b), c));
  }
  return median;
}
// Adds K rows of x - x0: first their own mean and squares, then one merge. All V counts are equal.
template <int K, typename T, int V, typename A>
__device__ void add_rows(Moments<A> (&mine)[V], const Vector<T, V>* rows, const Vector<A, V>& x0) {
  const A count = mine[0].count + K, weight = K / count, before = mine[0].count * weight;
#pragma unroll
  for (int e = 0; e < V; ++e) {
    A x[K], mean = 0, m2 = 0;
    for (int i = 0; i < K; ++i) x[i] = A(rows[i].at[e]) - x0.at[e];
    for (int i = 0; i < K; ++i) mean += x[i] * A(1. / K);
    for (int i = 0; i < K; ++i) m2 += (x[i] - mean) * (x[i] - mean);
    const A distance = mean - mine[e].mean;
    mine[e] = {count, mine[e].mean + distance * weight, mine[e].m2 + m2 + distance * (distance * before)};
  }
}

// Every block of the second kernel reads `slabs` partial results of a channel and rows / slabs of its rows:
// slabs <= sqrt(rows / 32) keeps the first far below the second, and there is no use for more than two
// blocks per multiprocessor. No slab is empty.
inline Split split(const Tensor& x, const BnSizes& b, int channels_per_tile, int values_per_row, int rows_at_once) {
  const int64_t rows = b.count / values_per_row, tiles = ceil_div(b.channels, channels_per_tile);
  const int64_t most = ceil_div(2 * multiprocessors(x), tiles * b.groups);
  const int64_t slabs = std::clamp<int64_t>(std::sqrt(rows / 32.), 1, most);
  const int64_t slab_rows = ceil_div(ceil_div(rows, slabs), rows_at_once) * rows_at_once;
  check(tiles * b.groups * slabs <= INT32_MAX, "bn_leaky_relu: too many channels and groups: ", shape(x));
  Split s{b.channels, b.inner, b.channels * b.count, b.count, rows, slab_rows, {}, int(tiles),
          int(ceil_div(rows, slab_rows)), int(b.groups)};
  for (int i = 0; i < 3; ++i) {
    const int64_t value = (b.count - 1) / 2 * i + (i == 2 ? (b.count - 1) % 2 : 0);
    s.samples[i] = value / b.inner * b.channels * b.inner + value % b.inner;
  }
  return s;
}
template <typename T, int V, bool kLast>
inline Split split(const Tensor& x, const BnSizes& b) {
  return split(x, b, kLast ? kTile : 1, kLast ? 1 : V, Thread<V, kLast>::kDown);
}
template <typename P>
Tensor partials(const Tensor& x, const Split& s) {
  return new_like(x, {int64_t(s.groups) * s.slabs * s.channels * int64_t(sizeof(P))}, ScalarType::Byte);
}
// The widest access that sizes and pointers allow, in the layout of x: calls f.operator()<V, kLast>(). Doubles
// go one by one: they are there to be checked against, and every further kernel is compile time.
template <typename T>
constexpr int kWidest = std::is_same_v<T, double> ? 1 : kVector<T>;
template <typename T>
bool aligned(const Tensor& t) {
  return is_aligned<kWidest<T>>(t.const_data_ptr<T>());
}
template <typename T, typename F>
void for_access(const BnSizes& s, bool aligned, const F& f) {
  constexpr int V = kWidest<T>;
  const bool last = s.inner == 1, vectors = aligned && (last ? s.channels : s.inner) % V == 0;
  if (last && vectors) return f.template operator()<V, true>();
  if (last) return f.template operator()<1, true>();
  if (vectors) return f.template operator()<V, false>();
  f.template operator()<1, false>();
}
}  // namespace dcgan
