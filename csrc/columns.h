// How the CPU kernel of bn_leaky_relu cuts its tensors: blocks of channels, tiles, pieces, columns.
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "vectors.h"

namespace dcgan {
// Columns of a piece: its four lines, those asked for meanwhile, sums and constants fit the L1 cache
constexpr int64_t Width = 256;
// `blocks` blocks of `per_block` channels, each cut into `chunks` tiles along the rows, a tile into pieces.
//   NCHW           per row of x a run of per_block * inner adjacent values, or pieces of one channel's run
//   channels_last  few channels: whole rows, several to a line; many channels: `Width` channels of each row
// channels_last has chunks, for threads; NCHW has one, so that its tile is still in cache when read again.
struct Cut {
  int64_t channels, inner, rows, per_block, blocks, chunks, width;
  bool folded;  // several rows of x to a line

  explicit Cut(const BnSizes& s) : channels(s.channels), inner(s.inner), rows(s.outer / s.groups) {
    folded = inner == 1 && channels < Width;
    per_block = folded ? channels : std::min(channels, std::max<int64_t>(1, Width / inner));
    blocks = (channels + per_block - 1) / per_block;
    int64_t run = per_block * inner, lines = (run + Width - 1) / Width;
    width = folded ? Width / channels * channels : (run + lines - 1) / lines;
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
  // f(first column, how many, channel in the block) for the columns of a piece, channel by channel
  template <typename F>
  void columns(int64_t block, const F& f) const {
    const int64_t count = channels_of(block);
    int64_t channel = 0;
    auto next = [&] { channel = channel + 1 == count ? 0 : channel + 1; };
    if (inner == 1) {  // one column, known to the compiler: f becomes plain assignments
      for (int64_t j = 0; j < width; ++j, next()) f(j, 1, channel);
    } else {
      for (int64_t j = 0; j < width; j += inner, next()) f(j, std::min(inner, width - j), channel);
    }
  }
  // to[j] = value(channel in the block) for the columns of a piece
  template <typename A, typename F>
  void spread(int64_t block, A* to, const F& value) const {
    columns(block, [&](int64_t j, int64_t n, int64_t channel) { std::fill_n(to + j, n, A(value(channel))); });
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
struct Sums {  // per column of a tile; `b` half a page from `a`, or the processor takes one for the other
  double a[Width] = {}, b[Width] = {};
};
template <typename A>
struct Constants {  // per column of a tile
  A mean[Width], scale[Width], bias[Width];
  Constants(const Cut& cut, int64_t block, const A* means, const A* invstds, const A* weight,
            const A* biases) {
    const int64_t first = cut.first_channel(block);
    means += first, invstds += first;
    cut.spread(block, mean, [&](int64_t c) { return means[c]; });
    cut.spread(block, scale, [&](int64_t c) { return weight ? weight[first + c] * invstds[c] : invstds[c]; });
    cut.spread(block, bias, [&](int64_t c) { return biases ? biases[first + c] : 0; });
  }
};
// Two sums per channel and chunk, fp64
struct Partials {
  const Cut& cut;
  std::vector<double> data;
  explicit Partials(const Cut& c) : cut(c), data(2 * c.chunks * c.channels) {}

  void put(int64_t block, int64_t chunk, const Sums& sums) {
    double* to = &data[2 * (chunk * cut.channels + cut.first_channel(block))];
    cut.columns(block, [&](int64_t j, int64_t n, int64_t c) {
      to[2 * c] += added(sums.a + j, n), to[2 * c + 1] += added(sums.b + j, n);
    });
  }
  static double added(const double* x, int64_t n) {  // four sums at a time: one would wait for itself
    double lane[4] = {};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
      for (int l = 0; l < 4; ++l) lane[l] += x[i + l];
    for (; i < n; ++i) lane[0] += x[i];
    return (lane[0] + lane[1]) + (lane[2] + lane[3]);
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
