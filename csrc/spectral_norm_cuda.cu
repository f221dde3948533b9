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
#include "sn_tiles.cuh"

namespace dcgan {
namespace {

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
  const T length = sqrt(block_sum(square));  // a barrier for the slots, too
  const T norm = length < all.eps ? all.eps : length;  // not max, which would lose a NaN
  for (int64_t r = int64_t(block) * kThreads + threadIdx.x; r < l.rows; r += int64_t(l.column_blocks) * kThreads)
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
    const T norm = sqrt(block_sum(sum)), bounded = norm < all.eps ? all.eps : norm;
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
  const T sigma = all.sigmas[tile.layer], factor = block_sum(dot) / sigma / sigma;  // its square may overflow
  l.vectors ? gradient_tile<kVector<T>>(l, tile, sigma, factor, grad)
            : gradient_tile<1>(l, tile, sigma, factor, grad);
}

// ---------------------------------------------------------------------------------------------- launchers
std::vector<Tensor> each(const std::vector<Tensor>& from, Tensor (*make)(const Tensor&)) {
  std::vector<Tensor> made;
  for (auto& t : from) made.push_back(make(t));
  return made;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, Tensor> spectral_norm_cuda(
    const std::vector<Tensor>& weights_any, const std::vector<Tensor>& us_any,
    const std::vector<Tensor>& vs_any, double eps, bool update, std::optional<ScalarType> out_dtype) {
  check_spectral_norm(weights_any, us_any, vs_any);
  const auto type = sn_out_dtype(weights_any, out_dtype);
  torch::stable::accelerator::DeviceGuard guard(weights_any[0].get_device_index());
  const auto weights = each(weights_any, dense), us = each(us_any, in_row_order), vs = each(vs_any, in_row_order);
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
  const auto weights = each(weights_any, dense), us = each(us_any, in_row_order), vs = each(vs_any, in_row_order);
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
