// Spectral normalization of a whole list of weights on CUDA: one power iteration and W / sigma, and backward.
//
// forward    update: t = W v, u = t / max(|t|, eps); s = W'u, v = s / max(|s|, eps); sigma = u'W v, which is
//            |s|^2 / max(|s|, eps): no third product. eval: u and v stay, sigma = u'(W v).
//            W_sn = W / sigma, in the dtype that the convolution wants
// backward   dW = G / sigma - (<G, W> / sigma^2) u v', as u and v are constants of the iteration
// layout     a weight (out, in, ...) is the matrix of its rows and columns as they lie in memory, row-major
//            or channels_last; only v, which is in logical order, is reached through `logical`. A block owns
//            a few whole rows, its tile: a thread reads the same columns of all, kVector<T> at a time.
// launches   update three, eval two, backward two; kLayers weights each, more weights in further launches.
//            (1) t of a tile; then, while the tile is in the L1 cache, its part t'W of the column sums
//            (2) 32 * kVector columns a block: s from the parts of all tiles, parts of |s|^2; u = t / |t|
//            (3) tiles again: every block adds up |s|^2 and scales its rows; v = s / |s|
// bytes      forward: W is read by (1) and by (3), W_sn is written; the parts are 1 / tile_rows of W, written
//            and read. backward: W once, G twice, dW written. The five matrices of a DCGAN discriminator
//            (11 MB at ndf = 64) stay in the L2 cache throughout.
// precision  fp32 (fp64 for double); fixed orders of addition and no atomics: two runs are bitwise equal
// sources    Miyato et al. 2018; torch.nn.utils.parametrizations.spectral_norm, which it equals step by step
#include "cuda_common.cuh"

namespace dcgan {
namespace {

constexpr int kLayers = 16;       // weights in one launch: what fits the 4 KB of kernel parameters
constexpr int kTileRows = 8;      // rows of a tile, at most
constexpr int kTileSize = 32768;  // values of a tile, at most, unless one row has more: 128 KB of L1 cache

template <typename T>
struct Layer {
  const T *weight, *u, *v;
  const void* grad;                        // backward: in out_dtype
  void* out;                               // W / sigma in out_dtype; backward: dW like W
  T *new_u, *new_v;                        // what the iteration makes of them
  T *t, *tile_sums, *parts;                // W v; per tile |t|^2, u't or <G, W>, and t'W: tiles x padded_cols
  T *s, *column_sums;                      // W'u; per block of (2) |s|^2
  int rows, cols, padded_cols, taps, ins;  // column j is input j / taps, tap j % taps; ins > 0: channels_last
  int tile_rows, tiles, column_blocks;
  int first_tile, first_column_block;      // where the blocks of this layer begin in the grid
  bool vectors;                            // 16-byte accesses: sizes and pointers allow them

  // The place in v of column j of memory; channels_last memory has input j % ins and tap j / ins.
  __device__ int logical(int j) const { return ins ? j % ins * taps + j / ins : j; }
};
template <typename T>
struct Layers {
  Layer<T> at[kLayers];
  T* sigmas;
  T eps;
  int count;
  bool update;
};

// A block's tile: rows [row, row + rows) of a layer.
template <typename T>
struct Tile {
  int layer, index, row, rows;
  __device__ explicit Tile(const Layers<T>& all) : layer(0) {
    while (layer + 1 < all.count && all.at[layer + 1].first_tile <= int(blockIdx.x)) ++layer;
    const Layer<T>& l = all.at[layer];
    index = blockIdx.x - l.first_tile;
    row = index * l.tile_rows;
    rows = min(l.tile_rows, l.rows - row);
  }
  __device__ int64_t offset(const Layer<T>& l, int r, int j) const { return int64_t(row + r) * l.cols + j; }
};

// Columns [j, j + V) of the tile's rows in a matrix shaped like the weight, zeros below the last row. All
// loads are in flight before the first is used.
template <int V, typename T, typename S>
__device__ void load_rows(const Layer<T>& l, const Tile<T>& tile, const S* from, int j,
                          Vector<S, V> (&rows)[kTileRows]) {
#pragma unroll
  for (int r = 0; r < kTileRows; ++r)
    rows[r] = r < tile.rows ? load<V>(from + tile.offset(l, r, j)) : Vector<S, V>{};
}

// x / sigma. Where one side is a half type, the rounding of 1 / sigma is lost in that of the half type, and a
// product is several times cheaper than a division.
template <typename O, typename T>
struct Divide {
  T sigma, inverse;
  __device__ explicit Divide(T s) : sigma(s), inverse(1 / s) {}
  __device__ T operator()(T x) const { return std::is_same_v<O, T> ? x / sigma : x * inverse; }
};

// ---------------------------------------------------------------------------------------------- forward
// t of the tile's rows, in every thread.
template <int V, typename T>
__device__ void times_v(const Layer<T>& l, const Tile<T>& tile, T (&t)[kTileRows]) {
  T sum[kTileRows] = {};
  for (int j = threadIdx.x * V; j < l.cols; j += kThreads * V) {
    Vector<T, V> w[kTileRows];
    load_rows(l, tile, l.weight, j, w);
    for (int e = 0; e < V; ++e) {
      const T v = l.v[l.logical(j + e)];
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) sum[r] += w[r].at[e] * v;
    }
  }
  __shared__ T slots[kTileRows][kWarps];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    sum[r] = warp_sum(sum[r]);
    if (lane == 0) slots[r][warp] = sum[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) t[r] = warp_sum(lane < kWarps ? slots[r][lane] : 0);
}
// The tile's part of W't.
template <int V, typename T>
__device__ void transposed_times_t(const Layer<T>& l, const Tile<T>& tile, const T (&t)[kTileRows]) {
  for (int j = threadIdx.x * V; j < l.padded_cols; j += kThreads * V) {
    Vector<T, V> w[kTileRows] = {}, part{};
    if (j < l.cols) load_rows(l, tile, l.weight, j, w);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r)
      for (int e = 0; e < V; ++e) part.at[e] += t[r] * w[r].at[e];
    store(l.parts + int64_t(tile.index) * l.padded_cols + j, part);
  }
}
template <typename T>
__global__ void __launch_bounds__(kThreads, 1) sn_rows(const __grid_constant__ Layers<T> all) {
  const Tile<T> tile(all);
  const Layer<T>& l = all.at[tile.layer];
  T t[kTileRows];
  l.vectors ? times_v<kVector<T>>(l, tile, t) : times_v<1>(l, tile, t);
  if (threadIdx.x == 0) {
    T sum = 0;
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      if (r >= tile.rows) break;
      l.t[tile.row + r] = t[r];
      sum += t[r] * (all.update ? t[r] : l.u[tile.row + r]);
    }
    l.tile_sums[tile.index] = sum;
  }
  if (!all.update) return;
  l.vectors ? transposed_times_t<kVector<T>>(l, tile, t) : transposed_times_t<1>(l, tile, t);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) sn_columns(const __grid_constant__ Layers<T> all) {
  constexpr int V = kVector<T>, kColumns = kLanes * V;
  int layer = 0;
  while (layer + 1 < all.count && all.at[layer + 1].first_column_block <= int(blockIdx.x)) ++layer;
  const Layer<T>& l = all.at[layer];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int block = blockIdx.x - l.first_column_block, mine = block * kColumns + lane * V;

  __shared__ Vector<T, V> slots[kWarps][kLanes];
  Vector<T, V> sum{};
  if (mine < l.padded_cols)
#pragma unroll 4
    for (int tile = warp; tile < l.tiles; tile += kWarps) {
      const auto part = load<V>(l.parts + int64_t(tile) * l.padded_cols + mine);
      for (int e = 0; e < V; ++e) sum.at[e] += part.at[e];
    }
  slots[warp][lane] = sum;

  T square = 0;
  for (int tile = threadIdx.x; tile < l.tiles; tile += kThreads) square += l.tile_sums[tile];
  const T norm = max(sqrt(block_sum(square)), all.eps);  // block_sum is a barrier for the slots, too
  for (int64_t r = block * kThreads + threadIdx.x; r < l.rows; r += int64_t(l.column_blocks) * kThreads)
    l.new_u[r] = l.t[r] / norm;

  const int j = block * kColumns + threadIdx.x;
  T s = 0;
  if (threadIdx.x < kColumns && j < l.cols) {
    for (int w = 0; w < kWarps; ++w) s += slots[w][threadIdx.x / V].at[threadIdx.x % V];
    s /= norm;
    l.s[j] = s;
  }
  square = block_sum(s * s);
  if (threadIdx.x == 0) l.column_sums[block] = square;
}

template <int V, typename T, typename O>
__device__ void scale_tile(const Layer<T>& l, const Tile<T>& tile, T sigma, O* out) {
  const Divide<O, T> scale(sigma);
  for (int j = threadIdx.x * V; j < l.cols; j += kThreads * V) {
    Vector<T, V> w[kTileRows];
    load_rows(l, tile, l.weight, j, w);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      Vector<O, V> scaled;
      for (int e = 0; e < V; ++e) scaled.at[e] = O(scale(w[r].at[e]));
      if (r < tile.rows) store(out + tile.offset(l, r, j), scaled);
    }
  }
}
template <typename T, typename O>
__global__ void __launch_bounds__(kThreads, 1) sn_scale(const __grid_constant__ Layers<T> all) {
  const Tile<T> tile(all);
  const Layer<T>& l = all.at[tile.layer];
  const int64_t begin = int64_t(tile.index) * kThreads + threadIdx.x, stride = int64_t(l.tiles) * kThreads;
  T sum = 0, sigma;
  if (all.update) {
    for (int i = threadIdx.x; i < l.column_blocks; i += kThreads) sum += l.column_sums[i];
    const T norm = sqrt(block_sum(sum)), bounded = max(norm, all.eps);
    for (int64_t j = begin; j < l.cols; j += stride) l.new_v[l.logical(j)] = l.s[j] / bounded;
    sigma = norm * (norm / bounded);
  } else {
    for (int i = threadIdx.x; i < l.tiles; i += kThreads) sum += l.tile_sums[i];
    sigma = block_sum(sum);
    for (int64_t r = begin; r < l.rows; r += stride) l.new_u[r] = l.u[r];
    for (int64_t j = begin; j < l.cols; j += stride) l.new_v[j] = l.v[j];
  }
  if (tile.index == 0 && threadIdx.x == 0) all.sigmas[tile.layer] = sigma;
  O* out = static_cast<O*>(l.out);
  l.vectors ? scale_tile<kVector<T>>(l, tile, sigma, out) : scale_tile<1>(l, tile, sigma, out);
}

// ---------------------------------------------------------------------------------------------- backward
template <int V, typename T, typename O>
__device__ T dot_tile(const Layer<T>& l, const Tile<T>& tile, const O* grad) {
  T sum = 0;
  for (int j = threadIdx.x * V; j < l.cols; j += kThreads * V) {
    Vector<T, V> w[kTileRows];
    Vector<O, V> g[kTileRows];
    load_rows(l, tile, l.weight, j, w);
    load_rows(l, tile, grad, j, g);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r)
      for (int e = 0; e < V; ++e) sum += T(g[r].at[e]) * w[r].at[e];
  }
  return sum;
}
template <typename T, typename O>
__global__ void __launch_bounds__(kThreads, 1) sn_dots(const __grid_constant__ Layers<T> all) {
  const Tile<T> tile(all);
  const Layer<T>& l = all.at[tile.layer];
  const O* grad = static_cast<const O*>(l.grad);
  const T dot = block_sum(l.vectors ? dot_tile<kVector<T>>(l, tile, grad) : dot_tile<1>(l, tile, grad));
  if (threadIdx.x == 0) l.tile_sums[tile.index] = dot;
}

template <int V, typename T, typename O>
__device__ void gradient_tile(const Layer<T>& l, const Tile<T>& tile, T sigma, T factor, const O* grad) {
  const Divide<O, T> scale(sigma);
  T u[kTileRows];
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) u[r] = r < tile.rows ? factor * l.u[tile.row + r] : 0;
  for (int j = threadIdx.x * V; j < l.cols; j += kThreads * V) {
    Vector<O, V> g[kTileRows];
    T v[V];
    load_rows(l, tile, grad, j, g);
    for (int e = 0; e < V; ++e) v[e] = l.v[l.logical(j + e)];
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      Vector<T, V> dw;
      for (int e = 0; e < V; ++e) dw.at[e] = scale(T(g[r].at[e])) - u[r] * v[e];
      if (r < tile.rows) store(static_cast<T*>(l.out) + tile.offset(l, r, j), dw);
    }
  }
}
template <typename T, typename O>
__global__ void __launch_bounds__(kThreads, 1) sn_gradient(const __grid_constant__ Layers<T> all) {
  const Tile<T> tile(all);
  const Layer<T>& l = all.at[tile.layer];
  const O* grad = static_cast<const O*>(l.grad);
  T dot = 0;
  for (int i = threadIdx.x; i < l.tiles; i += kThreads) dot += l.tile_sums[i];
  const T sigma = all.sigmas[tile.layer], factor = block_sum(dot) / (sigma * sigma);
  l.vectors ? gradient_tile<kVector<T>>(l, tile, sigma, factor, grad)
            : gradient_tile<1>(l, tile, sigma, factor, grad);
}

// ---------------------------------------------------------------------------------------------- launchers
// Cuts `all` into launches of at most kLayers weights. One allocation holds what passes between the kernels.
template <typename T>
class Plan {
 public:
  std::vector<Layer<T>> layers;

  void add(const Tensor& weight, const Tensor& u, const Tensor& v) {
    const SnSizes s = sn_sizes(weight);
    check(s.cols < 1 << 30 && s.rows < 1 << 30, "spectral_norm: too many rows or columns: ", shape(weight));
    Layer<T> l{};
    l.weight = weight.const_data_ptr<T>(), l.u = u.const_data_ptr<T>(), l.v = v.const_data_ptr<T>();
    l.rows = s.rows, l.cols = s.cols, l.taps = s.taps, l.ins = s.channels_last ? s.cols / s.taps : 0;
    l.padded_cols = ceil_div(l.cols, kVector<T>) * kVector<T>;
    l.tile_rows = std::clamp(kTileSize / l.cols, 1, kTileRows);
    l.tiles = ceil_div(l.rows, l.tile_rows);
    l.column_blocks = ceil_div(l.cols, kLanes * kVector<T>);
    l.vectors = l.cols % kVector<T> == 0 && is_aligned<kVector<T>>(l.weight);
    layers.push_back(l);
  }
  // f(the layers of one launch, blocks of tiles, blocks of columns)
  template <typename F>
  void launches(const Tensor& sigmas, double eps, bool update, const F& f) {
    int64_t size = 0;
    for (auto& l : layers) size += place(l, nullptr, update);
    const Tensor storage = new_like(sigmas, {size}, sigmas.scalar_type());
    T* next = storage.mutable_data_ptr<T>();
    for (auto& l : layers) next += place(l, next, update);
    for (size_t begin = 0; begin < layers.size(); begin += kLayers) {
      Layers<T> all{};
      all.sigmas = sigmas.mutable_data_ptr<T>() + begin, all.eps = eps, all.update = update;
      int tiles = 0, column_blocks = 0;
      for (; all.count < kLayers && begin + all.count < layers.size(); ++all.count) {
        Layer<T>& l = all.at[all.count] = layers[begin + all.count];
        l.first_tile = tiles, l.first_column_block = column_blocks;
        tiles += l.tiles, column_blocks += l.column_blocks;
      }
      f(all, tiles, column_blocks);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }

 private:
  static int64_t place(Layer<T>& l, T* start, bool update) {  // returns how many values it takes
    int64_t used = 0;
    auto take = [&](int64_t count) {
      T* from = start ? start + used : nullptr;
      used += ceil_div(count, kVector<T>) * kVector<T>;
      return from;
    };
    l.parts = take(update ? int64_t(l.tiles) * l.padded_cols : 0);
    l.s = take(l.cols), l.t = take(l.rows);
    l.tile_sums = take(l.tiles), l.column_sums = take(l.column_blocks);
    return used;
  }
};

std::vector<Tensor> each(const std::vector<Tensor>& from, Tensor (*make)(const Tensor&)) {
  std::vector<Tensor> made;
  for (auto& t : from) made.push_back(make(t));
  return made;
}
Tensor contiguous(const Tensor& t) { return as(t, t.scalar_type()); }

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, Tensor> spectral_norm_cuda(
    const std::vector<Tensor>& weights_any, const std::vector<Tensor>& us_any,
    const std::vector<Tensor>& vs_any, double eps, bool update, std::optional<ScalarType> out_dtype) {
  check_spectral_norm(weights_any, us_any, vs_any);
  const auto type = sn_out_dtype(weights_any, out_dtype);
  torch::stable::accelerator::DeviceGuard guard(weights_any[0].get_device_index());
  const auto weights = each(weights_any, dense), us = each(us_any, contiguous), vs = each(vs_any, contiguous);
  const Tensor sigmas = new_like(weights[0], {int64_t(weights.size())}, weights[0].scalar_type());
  const auto new_us = each(us, torch::stable::empty_like), new_vs = each(vs, torch::stable::empty_like);
  std::vector<Tensor> scaled;
  for (auto& w : weights) scaled.push_back(empty_like(w, type));

  dispatch(type, [&](auto zero) {
    using O = decltype(zero);
    using T = wide_t<O>;  // of the weights, as sn_out_dtype checked
    Plan<T> plan;
    for (size_t i = 0; i < weights.size(); ++i) {
      plan.add(weights[i], us[i], vs[i]);
      plan.layers[i].new_u = new_us[i].template mutable_data_ptr<T>();
      plan.layers[i].new_v = new_vs[i].template mutable_data_ptr<T>();
      plan.layers[i].out = scaled[i].mutable_data_ptr();
    }
    const auto stream = current_stream(sigmas);
    plan.launches(sigmas, eps, update, [&](const Layers<T>& all, int tiles, int column_blocks) {
      sn_rows<T><<<tiles, kThreads, 0, stream>>>(all);
      if (update) sn_columns<T><<<column_blocks, kThreads, 0, stream>>>(all);
      sn_scale<T, O><<<tiles, kThreads, 0, stream>>>(all);
    });
  });
  return {scaled, new_us, new_vs, sigmas};
}

std::vector<Tensor> spectral_norm_backward_cuda(
    const std::vector<Tensor>& grads_any, const std::vector<Tensor>& weights_any,
    const std::vector<Tensor>& us_any, const std::vector<Tensor>& vs_any, const Tensor& sigmas) {
  check_spectral_norm_backward(grads_any, weights_any, us_any, vs_any, sigmas);
  torch::stable::accelerator::DeviceGuard guard(sigmas.get_device_index());
  const auto weights = each(weights_any, dense), us = each(us_any, contiguous), vs = each(vs_any, contiguous);
  const auto dws = each(weights, torch::stable::empty_like);
  std::vector<Tensor> grads;
  for (size_t i = 0; i < weights.size(); ++i) grads.push_back(in_layout_of(grads_any[i], weights[i]));

  dispatch(grads[0].scalar_type(), [&](auto zero) {
    using O = decltype(zero);
    using T = wide_t<O>;
    Plan<T> plan;
    for (size_t i = 0; i < weights.size(); ++i) {
      plan.add(weights[i], us[i], vs[i]);
      Layer<T>& l = plan.layers[i];
      l.grad = grads[i].const_data_ptr();
      l.out = dws[i].mutable_data_ptr();
      l.vectors = l.vectors && is_aligned<kVector<T>>(static_cast<const O*>(l.grad));
    }
    const auto stream = current_stream(sigmas);
    plan.launches(sigmas, 0, false, [&](const Layers<T>& all, int tiles, int) {
      sn_dots<T, O><<<tiles, kThreads, 0, stream>>>(all);
      sn_gradient<T, O><<<tiles, kThreads, 0, stream>>>(all);
    });
  });
  return dws;
}

STABLE_TORCH_LIBRARY_IMPL(dcgan, CUDA, m) {
  m.impl("spectral_norm", TORCH_BOX(&spectral_norm_cuda));
  m.impl("spectral_norm_backward", TORCH_BOX(&spectral_norm_backward_cuda));
}
}  // namespace
}  // namespace dcgan
