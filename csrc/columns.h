// How the CPU kernel of bn_leaky_relu cuts its tensors: blocks of channels, tiles, pieces, columns.
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "vectors.h"

namespace dcgan {
// Columns of a piece, so that its four lines, sums and constants fit the L1 cache
template <typename T>
constexpr int64_t Width = sizeof(T) == 2 ? 256 : 512;
// `blocks` blocks of `per_block` channels, each cut into `chunks` tiles along the rows, a tile into pieces.
//   NCHW           per row of x a run of per_block * inner adjacent values, or pieces of one channel's run
//   channels_last  few channels: whole rows, several to a line; many channels: `limit` channels of each row
// channels_last has chunks, for threads; NCHW has one, so that its tile is still in cache when read again.
struct Cut {
  int64_t channels, inner, rows, per_block, blocks, chunks, width;
  bool folded;  // several rows of x to a line

  Cut(const BnSizes& s, int64_t limit) : channels(s.channels), inner(s.inner), rows(s.outer / s.groups) {
    folded = inner == 1 && channels < limit;
    per_block = folded ? channels : std::min(channels, std::max<int64_t>(1, limit / inner));
    blocks = (channels + per_block - 1) / per_block;
    int64_t run = per_block * inner, lines = (run + limit - 1) / limit;
    width = folded ? limit / channels * channels : (run + lines - 1) / lines;
    chunks = inner > 1 ? 1 : std::clamp<int64_t>(rows * per_block / (1 << 16), 1, 64);
  }
  int64_t first_channel(int64_t block) const { return block * per_block; }
  int64_t channels_of(int64_t block) const { return std::min(per_block, channels - first_channel(block)); }

  // f(R, at, step, n, ahead) for each piece of a tile, in order: R = 4 or 1 lines of n values, `step` apart,
  // the next piece begins at + ahead
  template <typename F>
  void pieces(int64_t block, int64_t chunk, const F& f) const {
    int64_t begin = rows * chunk / chunks, end = rows * (chunk + 1) / chunks, pitch = channels * inner;
    int64_t at = begin * pitch + first_channel(block) * inner, run = channels_of(block) * inner;
    if (folded) run = (end - begin) * pitch, end = begin + 1;
    if (run <= width) {
      down(at, end - begin, pitch, run, f);
    } else {
      for (int64_t row = begin; row < end; ++row, at += pitch) {
        down(at, run / width, width, width, f);
        if (run % width) down(at + run / width * width, 1, width, run % width, f);
      }
    }
  }
  // Line r of a piece comes from the r-th quarter of the tile: four lines of one page would be four streams
  // that the processor's prefetcher takes for one.
  template <typename F>
  static void down(int64_t at, int64_t lines, int64_t step, int64_t n, const F& f) {
    const int64_t quarter = lines / 4;
    for (int64_t i = 0; i < quarter; ++i) {
      f(std::integral_constant<int, 4>{}, at + i * step, quarter * step, n, step);
    }
    for (int64_t i = 4 * quarter; i < lines; ++i) {
      f(std::integral_constant<int, 1>{}, at + i * step, step, n, step);
    }
  }
  // f(column, channel in the block) for the columns of a piece
  template <typename F>
  void columns(int64_t block, const F& f) const {
    int64_t count = channels_of(block), channel = 0;
    for (int64_t j = 0; j < width; channel = channel + 1 == count ? 0 : channel + 1)
      for (int64_t i = 0; i < inner && j < width; ++i) f(j++, channel);
  }
  // sums(block, chunk) for all tiles, then finish(block), then apply(block, chunk) for all tiles
  template <typename Sums, typename Finish, typename Apply>
  void run(const Sums& sums, const Finish& finish, const Apply& apply) const {
    using torch::stable::parallel_for;
    int64_t tiles = blocks * chunks, values = std::max<int64_t>(1, channels * inner * rows / tiles);
    int64_t grain = std::max<int64_t>(1, 32768 / values);
    auto each = [&](const auto& f) {
      parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) f(t / chunks, t % chunks);
      });
    };
    if (chunks > 1) {
      each(sums);
      for (int64_t b = 0; b < blocks; ++b) finish(b);
      each(apply);
    } else {
      each([&](int64_t b, int64_t c) { sums(b, c), finish(b), apply(b, c); });
    }
  }
};
template <typename T>
struct Sums {  // per column of a tile; `b` half a page from `a`, or the processor takes one for the other
  double a[Width<T>] = {}, gap[Width<T> == 512 ? 256 : 0], b[Width<T>] = {};
};
template <typename T, typename A = wide_t<T>>
struct Constants {  // per column of a tile
  A mean[Width<T>], scale[Width<T>], bias[Width<T>];
  Constants(const Cut& cut, int64_t block, const A* means, const A* invstds, const A* weight,
            const A* biases) {
    int64_t first = cut.first_channel(block);
    cut.columns(block, [&](int64_t j, int64_t c) {
      mean[j] = means[first + c];
      scale[j] = weight ? weight[first + c] * invstds[first + c] : invstds[first + c];
      bias[j] = biases ? biases[first + c] : A(0);
    });
  }
};
// Two sums per channel and chunk, fp64
struct Partials {
  const Cut& cut;
  std::vector<double> data;
  explicit Partials(const Cut& c) : cut(c), data(2 * c.chunks * c.channels) {}

  void put(int64_t block, int64_t chunk, const double* sum, const double* other) {
    double* to = &data[2 * (chunk * cut.channels + cut.first_channel(block))];
    cut.columns(block, [&](int64_t j, int64_t c) { to[2 * c] += sum[j], to[2 * c + 1] += other[j]; });
  }
  std::pair<double, double> total(int64_t channel) const {
    double a = 0, b = 0;
    for (int64_t k = 0; k < cut.chunks; ++k) {
      a += data[2 * (k * cut.channels + channel)];
      b += data[2 * (k * cut.channels + channel) + 1];
    }
    return {a, b};
  }
};
}  // namespace dcgan
