// How the CUDA kernels of spectral_norm share out a list of weights: layers, tiles of rows, launches.
#pragma once
#include "cuda_common.cuh"

namespace dcgan {

constexpr int kLayers = 16;       // weights in one launch; 28 would fill the 4 KB of kernel parameters
constexpr int kTileRows = 8;      // rows of a tile, at most
constexpr int kTileSize = 32768;  // values of a tile, at most, unless one row has more: 128 KB of L1 cache

template <typename T>
struct Layer {
  const T *weight, *u, *v;
  const void* grad;                        // backward: in out_dtype
  void* out;                               // W / sigma in out_dtype; backward: dW like W
  T *new_u, *new_v;                        // what the iteration makes of them
  T *t, *tile_sums, *parts;                // W v; per tile |t|^2, u't or <G, W>, and t'W: tiles x padded_cols
  T *s, *column_sums;                      // W'u; per block of sn_columns |s|^2
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
// Cuts `all` into launches of at most kLayers weights. One allocation holds what passes between the kernels.
template <typename T>
class Plan {
 public:
  std::vector<Layer<T>> layers;

  void add(const Tensor& weight, const Tensor& u, const Tensor& v) {
    const SnSizes s = sn_sizes(weight);
    check(s.cols < 1 << 30 && s.rows < 1 << 30, "spectral_norm on CUDA takes fewer than 2^30 rows and columns; got ",
          shape(weight), ": leave --fused out");
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
}  // namespace dcgan
