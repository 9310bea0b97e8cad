// The layers and the loss of training on a CPU, forward and backward, in float32.
//
// XLA runs a layer as some forty operations, writes what the backward pass needs into stacks, and takes gigabytes of
// memory anew for every step. Here all layers are one call each way: products run on packed blocks that fit the cores'
// caches, attention visits what its documents need, and what is small is done on rows that a core has just made.

#include "common.h"

namespace duplex {
namespace {

// Products.

// Element (i, j) lies at data[i * rows + j * columns].
struct View {
  const float* data;
  int64_t rows, columns;

  View Transposed() const { return {data, columns, rows}; }
  View From(int64_t i, int64_t j) const { return {data + i * rows + j * columns, rows, columns}; }
};

// Memory that grows with what is asked of it, for the calls' own numbers.
class Buffer {
 public:
  float* Get(int64_t n) {
    if (n > size_) {
      data_.reset(new float[n]);
      size_ = n;
    }
    return data_.get();
  }

 private:
  std::unique_ptr<float[]> data_;
  int64_t size_ = 0;
};

// Packed blocks of the products of one call.
struct Workspace {
  Buffer panels, tiles;
};

constexpr int64_t kDepth = 1024;   // most of the summed dimension that is packed at once: a panel of it fits an L2 cache
constexpr int64_t kRowBlock = 192;  // rows of a task
constexpr int64_t kGroup = 4;       // panels that the tasks of all rows read before the next ones

// At most 64 columns of b [depth, width] as a panel [depth, 64], padded with zeros.
void PackPanel(View b, int64_t depth, int64_t width, float* to) {
  if (width < kPanel) std::fill_n(to, depth * kPanel, 0.0f);
  if (b.columns == 1) {
    for (int64_t d = 0; d < depth; ++d) std::memcpy(to + d * kPanel, b.data + d * b.rows, width * sizeof(float));
    return;
  }
  constexpr int64_t kBlock = 16;  // of depth, so that what is read of a line is read at once
  for (int64_t first = 0; first < depth; first += kBlock) {
    int64_t last = std::min(depth, first + kBlock);
    for (int64_t j = 0; j < width; ++j)
      for (int64_t d = first; d < last; ++d) to[d * kPanel + j] = b.data[d * b.rows + j * b.columns];
  }
}

// Rows of a [rows, depth], whose columns are contiguous, as packed tiles, each as high as ForTiles has it.
void PackTiles(View a, int64_t rows, int64_t depth, float* to) {
  constexpr int64_t kBlock = 32;  // of depth, so that what is read of a line is read at once
  for (int64_t first = 0; first < depth; first += kBlock) {
    int64_t last = std::min(depth, first + kBlock);
    ForTiles(rows, [&](auto height, int64_t i) {
      constexpr int R = decltype(height)::value;
      for (int64_t d = first; d < last; ++d)
        std::memcpy(to + i * depth + d * R, a.data + i + d * a.columns, R * sizeof(float));
    });
  }
}

// Where a product goes: out[i, j] = scale * sum, or that much more.
struct Target {
  float* out;
  int64_t stride;
  float scale = 1;
  bool add = false;
};

template <int R, int V>
inline void Put(const Vec (&sums)[R][V], int64_t width, const Target& to, float* out) {
  for (int r = 0; r < R; ++r, out += to.stride)
    for (int j = 0; j < V; ++j) {
      int64_t n = std::min<int64_t>(kLanes, width - j * kLanes);
      if (n <= 0) break;
      float* at = out + j * kLanes;
      Vec sum = sums[r][j] * Splat(to.scale);
      if (n == kLanes) {
        Store(at, to.add ? sum + Load(at) : sum);
      } else {
        for (int64_t i = 0; i < n; ++i) at[i] = to.add ? at[i] + sum[i] : sum[i];
      }
    }
}

// Rows of a, times one panel, on this core. Packed rows are tiles.
template <bool kPacked>
void Multiply(int64_t rows, int64_t depth, const float* a, int64_t stride, const float* panel, int64_t width,
              const Target& to) {
  ForTiles(rows, [&](auto height, int64_t i) {
    constexpr int R = decltype(height)::value;
    const float* own = a + i * (kPacked ? depth : stride);
    float* out = to.out + i * to.stride;
    for (int r = 0; r < R; ++r)
      for (int64_t j = 0; j < width; j += 16) __builtin_prefetch(out + r * to.stride + j, 1);
    if (width <= kLanes) {
      Vec sums[R][1];
      Tile<R, 1, kPacked>(panel, own, stride, depth, sums);
      Put(sums, width, to, out);
      return;
    }
    for (int64_t at = 0; at < width; at += kTile) {
      Vec sums[R][kVecs];
      Tile<R, kVecs, kPacked>(panel + at, own, stride, depth, sums);
      Put(sums, width - at, to, out + at);
    }
  });
}

// a [m, k] times b [k, n] on all cores. Sums are made in the same order however many cores there are.
void Gemm(int64_t m, int64_t n, int64_t k, View a, View b, const Target& to, Workspace& space) {
  const int64_t panels = (n + kPanel - 1) / kPanel, row_blocks = (m + kRowBlock - 1) / kRowBlock;
  const int64_t blocks = (k + kDepth - 1) / kDepth;
  const bool packed = a.columns != 1;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = k * block / blocks, depth = k * (block + 1) / blocks - first;
    float* b_packed = space.panels.Get(panels * kPanel * depth);
    float* a_packed = packed ? space.tiles.Get(m * depth) : nullptr;
    Pool::Get().Run(panels + (packed ? row_blocks : 0), (n + (packed ? m : 0)) * depth, [&](int64_t part) {
      if (part < panels) {
        int64_t column = part * kPanel;
        PackPanel(b.From(first, column), depth, std::min(kPanel + 0L, n - column), b_packed + column * depth);
      } else {
        int64_t row = (part - panels) * kRowBlock;
        PackTiles(a.From(row, first), std::min(kRowBlock, m - row), depth, a_packed + row * depth);
      }
    });
    Target own = to;
    own.add = to.add || block > 0;
    Pool::Get().Run(row_blocks * panels, m * n * depth, [&](int64_t part) {
      int64_t group = part / (row_blocks * kGroup), rest = part % (row_blocks * kGroup);
      int64_t width = std::min(kGroup, panels - group * kGroup);
      int64_t row = rest / width * kRowBlock, column = (group * kGroup + rest % width) * kPanel;
      int64_t rows = std::min(kRowBlock, m - row), columns = std::min<int64_t>(kPanel, n - column);
      Target here = own;
      here.out += row * to.stride + column;
      const float* panel = b_packed + column * depth;
      if (packed) {
        Multiply<true>(rows, depth, a_packed + row * depth, 0, panel, columns, here);
      } else {
        Multiply<false>(rows, depth, a.data + row * a.rows + first, a.rows, panel, columns, here);
      }
    });
  }
}

// Calls body(i, n) on every n <= kLanes of `width` numbers from i on; n is a constant where it is kLanes.
template <typename Body>
inline void ForVecs(int64_t width, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) body(i, std::integral_constant<int, kLanes>());
  if (i < width) body(i, static_cast<int>(width - i));
}

inline Vec Some(const float* p, std::integral_constant<int, kLanes>) { return Load(p); }
inline Vec Some(const float* p, int n) {
  Vec v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

inline void Keep(float* p, Vec v, std::integral_constant<int, kLanes>) { Store(p, v); }
inline void Keep(float* p, Vec v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}

// Layers.

struct Shape {
  int64_t layers, rows, length, hidden, mlp, num_heads, kv_heads, head_dim;
  float eps, residual_scale;

  int64_t tokens() const { return rows * length; }
  int64_t q_width() const { return num_heads * head_dim; }
  int64_t kv_width() const { return kv_heads * head_dim; }
  int64_t width() const { return q_width() + 2 * kv_width(); }  // of q, k and v side by side
};

enum Name { kQ, kK, kV, kO, kGate, kUp, kDown, kMatrices };

// Stacked weights [L, in, out], and the norms' [L, D].
struct Weights {
  const float *attn_norm, *mlp_norm;
  std::array<const float*, kMatrices> matrices;
  std::array<int64_t, kMatrices> in, out;

  // A layer's matrix [in, out].
  View Matrix(int name, int64_t layer) const {
    return {matrices[name] + layer * in[name] * out[name], out[name], 1};
  }
};

// What the backward pass needs of each layer's tokens, or, where `stride` is 0, of the present one.
struct Kept {
  float *x;         // what came in [D]
  float *qkv;       // q and k rotated, v [(N + 2 K) H]
  float *attended;  // attention's output [N H]
  float *totals;    // logarithm of the sum of each query's exponentials [N]
  float *mid;       // behind attention [D]
  float *gates;     // gate and up [2 F]
  int64_t stride;   // layers from one to the next: 1 or 0

  Kept Of(const Shape& s, int64_t layer) const {
    int64_t n = layer * stride * s.tokens();
    return {x + n * s.hidden, qkv + n * s.width(), attended + n * s.q_width(), totals + n * s.num_heads,
            mid + n * s.hidden, gates + n * 2 * s.mlp, stride};
  }
};

// Positions of a batch: rotary tables [tokens, H / 2] and segments [rows, length].
class Places {
 public:
  static constexpr int64_t kBlock = 64;  // queries or keys of a block of attention

  Places(const Shape& s, const float* cos, const float* sin, const int32_t* segments)
      : cos_(cos), sin_(sin), half_(s.head_dim / 2), length_(s.length), segments_(segments),
        blocks_((s.length + kBlock - 1) / kBlock), low_(s.rows * blocks_), high_(s.rows * blocks_) {
    for (int64_t row = 0; row < s.rows; ++row)
      for (int64_t block = 0; block < blocks_; ++block) {
        int32_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();
        for (int64_t t = block * kBlock; t < std::min(length_, (block + 1) * kBlock); ++t) {
          low = std::min(low, segments[row * length_ + t]);
          high = std::max(high, segments[row * length_ + t]);
        }
        low_[row * blocks_ + block] = low;
        high_[row * blocks_ + block] = high;
      }
  }

  int64_t blocks() const { return blocks_; }
  int64_t size(int64_t block) const { return std::min(kBlock, length_ - block * kBlock); }

  // Whether a block of queries may see keys of another: their ranges of segments meet.
  bool Meet(int64_t row, int64_t queries, int64_t keys) const {
    const int32_t *low = &low_[row * blocks_], *high = &high_[row * blocks_];
    return low[queries] <= high[keys] && low[keys] <= high[queries];
  }

  // Writes `value` [queries, kBlock] wherever a query does not see a key: a later one, or another document's.
  void Mask(int64_t row, int64_t queries, int64_t keys, float value, float* scores) const {
    const int32_t *low = &low_[row * blocks_], *high = &high_[row * blocks_];
    if (keys < queries && low[queries] == high[queries] && low[keys] == high[keys]) return;  // they meet: all the same
    const int32_t* segments = segments_ + row * length_;
    int64_t n = size(keys);
    for (int64_t i = 0; i < size(queries); ++i) {
      int32_t own = segments[queries * kBlock + i];
      int64_t seen = keys < queries ? n : i + 1;
      const int32_t* others = segments + keys * kBlock;
      float* to = scores + i * kBlock;
      for (int64_t j = 0; j < seen; ++j) to[j] = others[j] == own ? to[j] : value;
      std::fill(to + seen, to + n, value);
    }
  }

  // Rotates a token's heads [number, H] by its position, or back.
  void Rotate(int64_t token, int64_t number, bool back, float* x) const {
    const float *cos = cos_ + token * half_, *sin = sin_ + token * half_;
    for (int64_t head = 0; head < number; ++head, x += 2 * half_)
      for (int64_t h = 0; h < half_; ++h) {
        float c = cos[h], s = back ? -sin[h] : sin[h], low = x[h], high = x[h + half_];
        x[h] = low * c - high * s;
        x[h + half_] = high * c + low * s;
      }
  }

 private:
  const float *cos_, *sin_;
  int64_t half_, length_;
  const int32_t* segments_;
  int64_t blocks_;
  std::vector<int32_t> low_, high_;
};

constexpr int64_t kBlock = Places::kBlock;
constexpr float kMasked = -1e30f;

// b's panels [ceil(width / 64), depth, 64].
void PackPanels(View b, int64_t depth, int64_t width, float* to) {
  for (int64_t column = 0; column < width; column += kPanel)
    PackPanel(b.From(0, column), depth, std::min<int64_t>(kPanel, width - column), to + column * depth);
}

// a [rows, depth] times panels of `width` columns on this core; tiles are made of a where its rows are not contiguous.
void MultiplyHere(int64_t rows, int64_t depth, View a, const float* panels, int64_t width, Target to, float* tiles) {
  bool packed = a.columns != 1;
  if (packed) PackTiles(a, rows, depth, tiles);
  for (int64_t column = 0; column < width; column += kPanel) {
    Target here = to;
    here.out += column;
    int64_t columns = std::min<int64_t>(kPanel, width - column);
    const float* panel = panels + column * depth;
    if (packed) Multiply<true>(rows, depth, tiles, 0, panel, columns, here);
    else Multiply<false>(rows, depth, a.data, a.rows, panel, columns, here);
  }
}

inline int64_t Padded(int64_t width) { return (width + kPanel - 1) / kPanel * kPanel; }

// One row's head of attention in memory.
struct Head {
  View q, k, v;
  int64_t row, head;

  Head(const Shape& s, const float* qkv, int64_t row, int64_t head) : row(row), head(head) {
    int64_t kv = head / (s.num_heads / s.kv_heads), H = s.head_dim;
    const float* first = qkv + row * s.length * s.width();
    q = {first + head * H, s.width(), 1};
    k = {first + s.q_width() + kv * H, s.width(), 1};
    v = {first + s.q_width() + s.kv_width() + kv * H, s.width(), 1};
  }
};

// FlashAttention (Dao et al. 2022, algorithm 1): a running softmax over blocks of keys, which all heads that share them
// see one after the other.
void Attend(const Shape& s, const Places& places, const Kept& kept) {
  const int64_t H = s.head_dim, blocks = places.blocks(), group = s.num_heads / s.kv_heads;
  const float scale = 1 / std::sqrt(static_cast<float>(H));
  Pool::Get().Run(s.rows * s.kv_heads * blocks, s.tokens() * s.q_width() * kBlock, [&](int64_t task) {
    int64_t i = task % blocks, kv = task / blocks % s.kv_heads, row = task / blocks / s.kv_heads;
    int64_t queries = places.size(i);
    Floats own(H * kBlock + kBlock * Padded(H) + kBlock * kBlock + group * kBlock * (H + 2));
    float *keys = own.data(), *values = keys + H * kBlock, *scores = values + kBlock * Padded(H);
    float *outs = scores + kBlock * kBlock, *tops = outs + group * kBlock * H, *totals = tops + group * kBlock;
    std::fill_n(outs, group * kBlock * H, 0.0f);
    std::fill_n(tops, group * kBlock, kMasked);
    std::fill_n(totals, group * kBlock, 0.0f);
    for (int64_t j = 0; j <= i; ++j) {
      if (!places.Meet(row, i, j)) continue;
      int64_t n = places.size(j);
      for (int64_t g = 0; g < group; ++g) {
        Head at(s, kept.qkv, row, kv * group + g);
        if (g == 0) {
          PackPanel(at.k.From(j * kBlock, 0).Transposed(), H, n, keys);
          PackPanels(at.v.From(j * kBlock, 0), n, H, values);
        }
        float* out = outs + g * kBlock * H;
        MultiplyHere(queries, H, at.q.From(i * kBlock, 0), keys, n, {scores, kBlock, scale}, nullptr);
        places.Mask(row, i, j, kMasked, scores);
        for (int64_t r = 0; r < queries; ++r) {
          float *own_scores = scores + r * kBlock, &top = tops[g * kBlock + r], &total = totals[g * kBlock + r];
          float new_top = Max(own_scores, n, top);
          float before = std::exp(top - new_top);  // 0 where nothing before could be seen, which forgets it
          Map(own_scores, own_scores, n, [&](int64_t, Vec x) { return Exp(x - Splat(new_top)); });
          total = total * before + Sum(own_scores, n);
          top = new_top;
          if (before != 1)
            for (int64_t h = 0; h < H; ++h) out[r * H + h] *= before;
        }
        MultiplyHere(queries, n, {scores, kBlock, 1}, values, H, {out, H, 1, true}, nullptr);
      }
    }
    for (int64_t g = 0; g < group; ++g)
      for (int64_t r = 0; r < queries; ++r) {
        int64_t token = row * s.length + i * kBlock + r, head = kv * group + g, place = g * kBlock + r;
        float* to = kept.attended + token * s.q_width() + head * H;
        float factor = 1 / totals[place];
        for (int64_t h = 0; h < H; ++h) to[h] = outs[place * H + h] * factor;
        kept.totals[token * s.num_heads + head] = tops[place] + std::log(totals[place]);
      }
  });
}

// The way back (algorithm 4): from d_attended [tokens, N H] to d_qkv [tokens, (N + 2 K) H], q and k still rotated.
// What each head makes of keys and values goes into d_heads [2, tokens, N H] first.
void AttendBackward(const Shape& s, const Places& places, const Kept& kept, const float* d_attended, float* d_heads,
                    float* d_qkv) {
  const int64_t H = s.head_dim, T = s.length, blocks = places.blocks(), wide = s.q_width();
  const float scale = 1 / std::sqrt(static_cast<float>(H));
  float *d_keys = d_heads, *d_values = d_heads + s.tokens() * wide;
  Pool::Get().Run(s.rows * s.num_heads, s.tokens() * wide * kBlock, [&](int64_t task) {
    Head at(s, kept.qkv, task / s.num_heads, task % s.num_heads);
    const int64_t first = at.row * T, padded = Padded(H);
    View d_out{d_attended + first * wide + at.head * H, wide, 1};
    Floats own(T + 2 * H * kBlock + 3 * kBlock * padded + 2 * kBlock * kBlock + kBlock * kBlock);
    float *along = own.data(), *keys_across = along + T, *values_across = keys_across + H * kBlock;
    float *keys = values_across + H * kBlock, *queries = keys + kBlock * padded, *outs = queries + kBlock * padded;
    float *probs = outs + kBlock * padded, *d_scores = probs + kBlock * kBlock, *tiles = d_scores + kBlock * kBlock;
    for (int64_t t = 0; t < T; ++t) {
      const float *a = d_out.data + t * wide, *b = kept.attended + (first + t) * wide + at.head * H;
      Vec sum{};
      ForVecs(H, [&](int64_t h, auto n) { sum += Some(a + h, n) * Some(b + h, n); });
      along[t] = Sum(sum);
    }
    std::vector<bool> begun(blocks);  // queries that some keys were seen by
    for (int64_t j = 0; j < blocks; ++j) {
      int64_t n = places.size(j);
      View k = at.k.From(j * kBlock, 0), v = at.v.From(j * kBlock, 0);
      PackPanel(k.Transposed(), H, n, keys_across);
      PackPanel(v.Transposed(), H, n, values_across);
      PackPanels(k, n, H, keys);
      int64_t token = (first + j * kBlock) * wide + at.head * H;
      for (int64_t i = j; i < blocks; ++i) {
        if (!places.Meet(at.row, i, j)) continue;
        int64_t m = places.size(i);
        View q = at.q.From(i * kBlock, 0), d = d_out.From(i * kBlock, 0);
        MultiplyHere(m, H, q, keys_across, n, {probs, kBlock, scale}, nullptr);
        MultiplyHere(m, H, d, values_across, n, {d_scores, kBlock}, nullptr);
        for (int64_t r = 0; r < m; ++r) {
          float total = kept.totals[(first + i * kBlock + r) * s.num_heads + at.head];
          Map(probs + r * kBlock, probs + r * kBlock, n, [&](int64_t, Vec x) { return Exp(x - Splat(total)); });
        }
        places.Mask(at.row, i, j, 0, probs);
        for (int64_t r = 0; r < m; ++r) {
          Vec less = Splat(along[i * kBlock + r]);
          ForVecs(n, [&](int64_t c, auto number) {
            float *p = probs + r * kBlock + c, *d = d_scores + r * kBlock + c;
            Keep(d, Some(p, number) * (Some(d, number) - less), number);
          });
        }
        PackPanels(d, m, H, outs);
        PackPanels(q, m, H, queries);
        MultiplyHere(n, m, {probs, 1, kBlock}, outs, H, {d_values + token, wide, 1, i > j}, tiles);
        MultiplyHere(n, m, {d_scores, 1, kBlock}, queries, H, {d_keys + token, wide, scale, i > j}, tiles);
        float* d_q = d_qkv + (first + i * kBlock) * s.width() + at.head * H;
        MultiplyHere(m, n, {d_scores, kBlock, 1}, keys, H, {d_q, s.width(), scale, begun[i]}, nullptr);
        begun[i] = true;
      }
    }
  });
  const int64_t group = s.num_heads / s.kv_heads;
  ForTokens(s.tokens(), 2 * wide, [&](int64_t t) {
    float* to = d_qkv + t * s.width() + wide;
    for (const float* from : {d_keys + t * wide, d_values + t * wide})
      for (int64_t head = 0; head < s.kv_heads; ++head, to += H, from += group * H) {
        std::memcpy(to, from, H * sizeof(float));
        for (int64_t g = 1; g < group; ++g)
          for (int64_t h = 0; h < H; ++h) to[h] += from[g * H + h];
      }
  });
}

// d x += the way back through y = RmsNorm(x); d weight [D] is the sum over all tokens, in blocks of a fixed size.
void RmsNormBackward(const Shape& s, const float* x, const float* weight, const float* d_y, float* d_x,
                     float* d_weight, Buffer& partial) {
  constexpr int64_t kTokens = 32;
  const int64_t D = s.hidden, blocks = (s.tokens() + kTokens - 1) / kTokens;
  float* sums = d_weight == nullptr ? nullptr : partial.Get(blocks * D);
  Pool::Get().Run(blocks, s.tokens() * D, [&](int64_t block) {
    float* own = sums + block * D;
    if (sums != nullptr) std::fill_n(own, D, 0.0f);
    for (int64_t t = block * kTokens; t < std::min(s.tokens(), (block + 1) * kTokens); ++t) {
      const float *xs = x + t * D, *ds = d_y + t * D;
      Vec squares{}, along{};
      ForVecs(D, [&](int64_t i, auto n) {
        Vec v = Some(xs + i, n);
        squares += v * v;
        along += v * Some(ds + i, n) * Some(weight + i, n);
      });
      float factor = 1 / std::sqrt(Sum(squares) / D + s.eps);
      float back = factor * factor * factor * Sum(along) / D;
      ForVecs(D, [&](int64_t i, auto n) {
        Vec v = Some(xs + i, n), d = Some(ds + i, n) * Splat(factor);
        Keep(d_x + t * D + i, Some(d_x + t * D + i, n) + d * Some(weight + i, n) - v * Splat(back), n);
        if (sums != nullptr) Keep(own + i, Some(own + i, n) + d * v, n);
      });
    }
  });
  if (sums == nullptr) return;
  std::fill_n(d_weight, D, 0.0f);
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < D; ++i) d_weight[i] += sums[block * D + i];
}

inline Vec Sigmoid(Vec x) { return Splat(1.0f) / (Splat(1.0f) + Exp(-x)); }

// SwiGLU of gates [tokens, 2 F]: [tokens, F].
void SwiGlu(const Shape& s, const float* gates, float* out) {
  ForTokens(s.tokens(), 10 * s.mlp, [&](int64_t t) {
    const float *gate = gates + t * 2 * s.mlp, *up = gate + s.mlp;
    ForVecs(s.mlp, [&](int64_t i, auto n) {
      Vec g = Some(gate + i, n);
      Keep(out + t * s.mlp + i, g * Sigmoid(g) * Some(up + i, n), n);
    });
  });
}

// From d out [tokens, F] to d gates [tokens, 2 F]; and out itself, made again.
void SwiGluBackward(const Shape& s, const float* gates, const float* d_out, float* d_gates, float* out) {
  ForTokens(s.tokens(), 10 * s.mlp, [&](int64_t t) {
    const float *gate = gates + t * 2 * s.mlp, *up = gate + s.mlp, *d = d_out + t * s.mlp;
    float *d_gate = d_gates + t * 2 * s.mlp, *d_up = d_gate + s.mlp;
    ForVecs(s.mlp, [&](int64_t i, auto n) {
      Vec g = Some(gate + i, n), u = Some(up + i, n), dy = Some(d + i, n), sigmoid = Sigmoid(g), silu = g * sigmoid;
      Keep(out + t * s.mlp + i, silu * u, n);
      Keep(d_gate + i, dy * u * (sigmoid + silu * (Splat(1.0f) - sigmoid)), n);
      Keep(d_up + i, dy * silu, n);
    });
  });
}

void RmsNorms(const Shape& s, const float* x, const float* weight, float* out) {
  const int64_t D = s.hidden;
  ForTokens(s.tokens(), D, [&](int64_t t) { RmsNorm(x + t * D, weight, s.eps, D, out + t * D); });
}

// x [tokens, D] through all layers into `out`. `kept.x` begins with x.
void Forward(const Shape& s, const Weights& w, const Places& places, const Kept& all, float* out, Watch& watch) {
  const int64_t n = s.tokens(), D = s.hidden, F = s.mlp;
  Workspace space;
  Floats y(n * D), activated(n * F);
  for (int64_t layer = 0; layer < s.layers; ++layer) {
    Kept kept = all.Of(s, layer);
    float* next = layer + 1 < s.layers ? all.Of(s, layer + 1).x : out;
    auto product = [&](int name, View x, Target to) {
      Gemm(n, w.out[name], w.in[name], x, w.Matrix(name, layer), to, space);
    };
    RmsNorms(s, kept.x, w.attn_norm + layer * D, y.data());
    watch.Lap(kSmall);
    for (auto [name, at] : {std::pair(kQ, int64_t{0}), {kK, s.q_width()}, {kV, s.q_width() + s.kv_width()}})
      product(name, {y.data(), D, 1}, {kept.qkv + at, s.width()});
    watch.Lap(kProducts);
    ForTokens(n, s.width(), [&](int64_t t) {
      places.Rotate(t, s.num_heads + s.kv_heads, false, kept.qkv + t * s.width());
    });
    watch.Lap(kSmall);
    Attend(s, places, kept);
    watch.Lap(kAttention);
    product(kO, {kept.attended, s.q_width(), 1}, {y.data(), D, s.residual_scale});
    watch.Lap(kProducts);
    ForTokens(n, 2 * D, [&](int64_t t) {
      for (int64_t i = t * D; i < (t + 1) * D; ++i) kept.mid[i] = kept.x[i] + y[i];
      RmsNorm(kept.mid + t * D, w.mlp_norm + layer * D, s.eps, D, &y[t * D]);
    });
    watch.Lap(kSmall);
    product(kGate, {y.data(), D, 1}, {kept.gates, 2 * F});
    product(kUp, {y.data(), D, 1}, {kept.gates + F, 2 * F});
    watch.Lap(kProducts);
    SwiGlu(s, kept.gates, activated.data());
    watch.Lap(kSmall);
    product(kDown, {activated.data(), F, 1}, {y.data(), D, s.residual_scale});
    watch.Lap(kProducts);
    ForTokens(n, D, [&](int64_t t) {
      for (int64_t i = t * D; i < (t + 1) * D; ++i) next[i] = kept.mid[i] + y[i];
    });
    watch.Lap(kSmall);
  }
}

// Where the weights' gradients go: whole ones, or those of low-rank updates a [L, in, r] b [L, r, out] where there are
// any; nothing where there is no place for them.
struct Gradients {
  float *attn_norm = nullptr, *mlp_norm = nullptr;
  std::array<float*, kMatrices> matrices{};
  std::array<const float*, kMatrices> a{}, b{};
  std::array<float*, kMatrices> d_a{}, d_b{};
  int64_t rank = 0;
};

// From d x [tokens, D] of the last layer's output to that of the first one's input, in place.
void Backward(const Shape& s, const Weights& w, const Places& places, const Kept& all, const Gradients& grads,
              float* d_x, Watch& watch) {
  const int64_t n = s.tokens(), D = s.hidden, F = s.mlp, wide = s.q_width(), r = grads.rank;
  Workspace space;
  Buffer partial;
  Floats y(n * D), d_y(n * std::max(D, wide)), activated(n * F), d_activated(n * F), d_gates(n * 2 * F);
  Floats d_qkv(n * s.width()), d_heads(2 * n * wide), thin(n * r);
  for (int64_t layer = s.layers - 1; layer >= 0; --layer) {
    Kept kept = all.Of(s, layer);
    // Of x [tokens, in] times the matrix: what its gradient takes, and d x.
    auto weight = [&](int name, View x, View d, float scale) {
      int64_t in = w.in[name], out = w.out[name];
      if (grads.matrices[name] != nullptr)
        Gemm(in, out, n, x.Transposed(), d, {grads.matrices[name] + layer * in * out, out, scale}, space);
      if (grads.d_a[name] == nullptr) return;
      View a{grads.a[name] + layer * in * r, r, 1}, b{grads.b[name] + layer * r * out, out, 1}, own{thin.data(), r, 1};
      Gemm(n, r, out, d, b.Transposed(), {thin.data(), r, scale}, space);
      Gemm(in, r, n, x.Transposed(), own, {grads.d_a[name] + layer * in * r, r}, space);
      Gemm(n, r, in, x, a, {thin.data(), r, scale}, space);
      Gemm(r, out, n, own.Transposed(), d, {grads.d_b[name] + layer * r * out, out}, space);
    };
    auto back = [&](int name, View d, Target to) {
      Gemm(n, w.in[name], w.out[name], d, w.Matrix(name, layer).Transposed(), to, space);
    };
    auto norm = [&](float* d_weight) { return d_weight == nullptr ? nullptr : d_weight + layer * D; };

    View d_out{d_x, D, 1};
    back(kDown, d_out, {d_activated.data(), F, s.residual_scale});
    watch.Lap(kProducts);
    SwiGluBackward(s, kept.gates, d_activated.data(), d_gates.data(), activated.data());
    RmsNorms(s, kept.mid, w.mlp_norm + layer * D, y.data());
    watch.Lap(kSmall);
    weight(kDown, {activated.data(), F, 1}, d_out, s.residual_scale);
    View d_gate{d_gates.data(), 2 * F, 1}, d_up{d_gates.data() + F, 2 * F, 1};
    weight(kGate, {y.data(), D, 1}, d_gate, 1);
    weight(kUp, {y.data(), D, 1}, d_up, 1);
    back(kGate, d_gate, {d_y.data(), D});
    back(kUp, d_up, {d_y.data(), D, 1, true});
    watch.Lap(kProducts);
    RmsNormBackward(s, kept.mid, w.mlp_norm + layer * D, d_y.data(), d_x, norm(grads.mlp_norm), partial);
    watch.Lap(kSmall);
    weight(kO, {kept.attended, wide, 1}, d_out, s.residual_scale);
    back(kO, d_out, {d_y.data(), wide, s.residual_scale});
    watch.Lap(kProducts);
    AttendBackward(s, places, kept, d_y.data(), d_heads.data(), d_qkv.data());
    watch.Lap(kAttention);
    ForTokens(n, s.width(), [&](int64_t t) {
      places.Rotate(t, s.num_heads + s.kv_heads, true, &d_qkv[t * s.width()]);
    });
    RmsNorms(s, kept.x, w.attn_norm + layer * D, y.data());
    watch.Lap(kSmall);
    int64_t at = 0;
    for (int name : {kQ, kK, kV}) {
      View d{d_qkv.data() + at, s.width(), 1};
      weight(name, {y.data(), D, 1}, d, 1);
      back(name, d, {d_y.data(), D, 1, at > 0});
      at += w.out[name];
    }
    watch.Lap(kProducts);
    RmsNormBackward(s, kept.x, w.attn_norm + layer * D, d_y.data(), d_x, norm(grads.attn_norm), partial);
    watch.Lap(kSmall);
  }
}

// What XLA hands over.

const float* Numbers(const ffi::RemainingArgs& args, size_t i) {
  return args.get<ffi::Buffer<ffi::F32>>(i)->typed_data();
}

float* Numbers(const ffi::RemainingRets& rets, size_t i) {
  return (*rets.get<ffi::Buffer<ffi::F32>>(i))->typed_data();
}

// Arguments of both passes: rotary cosines and sines [B, T, H / 2], segments int32 [B, T], attn_norm, mlp_norm, and the
// matrices of `Name`.
constexpr size_t kFirstMatrix = 5, kCommon = kFirstMatrix + kMatrices;

struct Common {
  Shape shape;
  Weights weights;
  Places places;

  static Shape ShapeOf(const ffi::RemainingArgs& args, int64_t kv_heads, float eps, float residual_scale) {
    auto cos = args.get<ffi::Buffer<ffi::F32>>(0)->dimensions();
    auto q = args.get<ffi::Buffer<ffi::F32>>(kFirstMatrix + kQ)->dimensions();
    auto down = args.get<ffi::Buffer<ffi::F32>>(kFirstMatrix + kDown)->dimensions();
    int64_t H = 2 * cos[2];
    return {q[0], cos[0], cos[1], q[1], down[1], q[2] / H, kv_heads, H, eps, residual_scale};
  }

  Common(const ffi::RemainingArgs& args, int64_t kv_heads, float eps, float residual_scale)
      : shape(ShapeOf(args, kv_heads, eps, residual_scale)),
        places(shape, Numbers(args, 0), Numbers(args, 1), args.get<ffi::Buffer<ffi::S32>>(2)->typed_data()) {
    weights.attn_norm = Numbers(args, 3);
    weights.mlp_norm = Numbers(args, 4);
    for (int name = 0; name < kMatrices; ++name) {
      auto matrix = *args.get<ffi::Buffer<ffi::F32>>(kFirstMatrix + name);
      weights.matrices[name] = matrix.typed_data();
      weights.in[name] = matrix.dimensions()[1];
      weights.out[name] = matrix.dimensions()[2];
    }
  }
};

// Then x [B, T, D]; results: x behind the layers, and where `keep` the members of `Kept`, stacked.
ffi::Error LayersImpl(ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t kv_heads, float eps,
                      float residual_scale, bool keep) {
  Watch watch;
  Common in(args, kv_heads, eps, residual_scale);
  const Shape& s = in.shape;
  int64_t n = s.tokens();
  const int64_t sizes[] = {s.hidden, s.width(), s.q_width(), s.num_heads, s.hidden, 2 * s.mlp};
  std::vector<Floats> own;
  float* parts[6];
  for (int i = 0; i < 6; ++i) {
    if (!keep) own.emplace_back(n * sizes[i]);
    parts[i] = keep ? Numbers(rets, 1 + i) : own.back().data();
  }
  Kept kept{parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], keep ? 1 : 0};
  const float* x = Numbers(args, kCommon);
  ForTokens(n, s.hidden, [&](int64_t t) {
    std::memcpy(kept.x + t * s.hidden, x + t * s.hidden, s.hidden * sizeof(float));
  });
  watch.Lap(kSmall);
  Forward(s, in.weights, in.places, kept, Numbers(rets, 0), watch);
  return ffi::Error::Success();
}

// Then the members of `Kept`, d of the layers' output, and, where `rank`, a and b of each matrix, empty where it has no
// update. Results: d x; then d of both norms and of the matrices, or, where `rank`, of each a and b.
ffi::Error LayersBackwardImpl(ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t kv_heads, float eps,
                              float residual_scale, int64_t rank) {
  Watch watch;
  Common in(args, kv_heads, eps, residual_scale);
  const Shape& s = in.shape;
  float* parts[6];
  for (int i = 0; i < 6; ++i) parts[i] = const_cast<float*>(Numbers(args, kCommon + i));  // only read
  Kept kept{parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], 1};
  Gradients grads;
  grads.rank = rank;
  if (rank == 0) {
    grads.attn_norm = Numbers(rets, 1);
    grads.mlp_norm = Numbers(rets, 2);
    for (int name = 0; name < kMatrices; ++name) grads.matrices[name] = Numbers(rets, 3 + name);
  } else {
    for (int name = 0; name < kMatrices; ++name) {
      if (args.get<ffi::Buffer<ffi::F32>>(kCommon + 7 + 2 * name)->element_count() == 0) continue;
      grads.a[name] = Numbers(args, kCommon + 7 + 2 * name);
      grads.b[name] = Numbers(args, kCommon + 8 + 2 * name);
      grads.d_a[name] = Numbers(rets, 1 + 2 * name);
      grads.d_b[name] = Numbers(rets, 2 + 2 * name);
    }
  }
  const float* d_out = Numbers(args, kCommon + 6);
  float* d_x = Numbers(rets, 0);
  ForTokens(s.tokens(), s.hidden, [&](int64_t t) {
    std::memcpy(d_x + t * s.hidden, d_out + t * s.hidden, s.hidden * sizeof(float));
  });
  watch.Lap(kSmall);
  Backward(s, in.weights, in.places, kept, grads, d_x, watch);
  return ffi::Error::Success();
}

// sum(weight * nll) of tokens' hidden states [n, D] under a head [V, D], and what its gradient takes: d hidden, d head,
// and the rows of d head that were asked for; each is empty where it is not wanted. Tokens that count for nothing are
// left out. Logits exist of `chunk` tokens at a time, transposed, so that the head is read as it lies.
ffi::Error CrossEntropyImpl(ffi::Buffer<ffi::F32> hidden, ffi::Buffer<ffi::F32> head, ffi::Buffer<ffi::S32> targets,
                            ffi::Buffer<ffi::F32> weights, ffi::Buffer<ffi::S32> ids, ffi::ResultBuffer<ffi::F32> loss,
                            ffi::ResultBuffer<ffi::F32> d_hidden, ffi::ResultBuffer<ffi::F32> d_head,
                            ffi::ResultBuffer<ffi::F32> d_rows, int64_t vocab, int64_t chunk) {
  Watch watch;
  const int64_t n = hidden.dimensions()[0], D = hidden.dimensions()[1], wanted_rows = ids.element_count();
  const bool backward = d_hidden->element_count() > 0, whole = d_head->element_count() > 0;
  std::vector<int64_t> tokens;
  for (int64_t t = 0; t < n; ++t)
    if (weights.typed_data()[t] != 0) tokens.push_back(t);
  if (backward) std::fill_n(d_hidden->typed_data(), n * D, 0.0f);
  std::fill_n(d_rows->typed_data(), d_rows->element_count(), 0.0f);
  if (whole) {
    int64_t from = tokens.empty() ? 0 : vocab * D;  // the rest is written by the first chunk's product
    std::fill_n(d_head->typed_data() + from, d_head->element_count() - from, 0.0f);
  }
  const int64_t count = tokens.size(), most = std::min(chunk, count);
  Workspace space;
  Floats logits(vocab * most), own(most * D), back(most * D), rows(wanted_rows * most);
  constexpr int64_t kWords = 512;  // of a part of the vocabulary
  const int64_t parts = (vocab + kWords - 1) / kWords;
  Floats tops(parts * most), totals(parts * most), normalisers(most);
  double sum = 0;
  for (int64_t first = 0; first < count; first += chunk) {
    const int64_t c = std::min(chunk, count - first);
    const int64_t* chosen = &tokens[first];
    ForTokens(c, D, [&](int64_t i) {
      std::memcpy(&own[i * D], hidden.typed_data() + chosen[i] * D, D * sizeof(float));
    });
    Gemm(vocab, c, D, {head.typed_data(), D, 1}, View{own.data(), D, 1}.Transposed(), {logits.data(), c}, space);
    auto of_part = [&](int64_t part, auto body) {
      for (int64_t v = part * kWords; v < std::min(vocab, (part + 1) * kWords); ++v) body(v, &logits[v * c]);
    };
    Pool::Get().Run(parts, vocab * c, [&](int64_t part) {
      float *top = &tops[part * c], *total = &totals[part * c];
      std::fill_n(top, c, kMasked);
      std::fill_n(total, c, 0.0f);
      of_part(part, [&](int64_t, const float* row) {
        for (int64_t i = 0; i < c; ++i) top[i] = std::max(top[i], row[i]);
      });
      of_part(part, [&](int64_t, const float* row) {
        ForVecs(c, [&](int64_t i, auto k) {
          Keep(total + i, Some(total + i, k) + Exp(Some(row + i, k) - Some(top + i, k)), k);
        });
      });
    });
    for (int64_t i = 0; i < c; ++i) {
      float top = kMasked, total = 0;
      for (int64_t part = 0; part < parts; ++part) top = std::max(top, tops[part * c + i]);
      for (int64_t part = 0; part < parts; ++part)
        total += totals[part * c + i] * std::exp(tops[part * c + i] - top);
      normalisers[i] = top + std::log(total);
      float said = logits[targets.typed_data()[chosen[i]] * c + i];
      sum += static_cast<double>(weights.typed_data()[chosen[i]]) * (normalisers[i] - said);
    }
    if (!backward) continue;
    Floats scale(c);
    for (int64_t i = 0; i < c; ++i) scale[i] = weights.typed_data()[chosen[i]];
    Pool::Get().Run(parts, vocab * c, [&](int64_t part) {
      of_part(part, [&](int64_t, float* row) {
        ForVecs(c, [&](int64_t i, auto k) {
          Keep(row + i, Exp(Some(row + i, k) - Some(normalisers.data() + i, k)) * Some(scale.data() + i, k), k);
        });
      });
    });
    for (int64_t i = 0; i < c; ++i) logits[targets.typed_data()[chosen[i]] * c + i] -= scale[i];
    View errors{logits.data(), c, 1}, states{own.data(), D, 1};
    Gemm(c, D, vocab, errors.Transposed(), {head.typed_data(), D, 1}, {back.data(), D}, space);
    ForTokens(c, D, [&](int64_t i) {
      std::memcpy(d_hidden->typed_data() + chosen[i] * D, &back[i * D], D * sizeof(float));
    });
    if (whole) Gemm(vocab, D, c, errors, states, {d_head->typed_data(), D, 1, first > 0}, space);
    if (wanted_rows > 0) {
      for (int64_t i = 0; i < wanted_rows; ++i)
        std::memcpy(&rows[i * c], &logits[ids.typed_data()[i] * c], c * sizeof(float));
      Gemm(wanted_rows, D, c, {rows.data(), c, 1}, states, {d_rows->typed_data(), D, 1, true}, space);
    }
  }
  *loss->typed_data() = static_cast<float>(sum);
  watch.Lap(kHead);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace duplex

XLA_FFI_DEFINE_HANDLER_SYMBOL(DuplexLayers, duplex::LayersImpl,
                              ffi::Ffi::Bind()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("kv_heads")
                                  .Attr<float>("eps")
                                  .Attr<float>("residual_scale")
                                  .Attr<bool>("keep"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(DuplexLayersBackward, duplex::LayersBackwardImpl,
                              ffi::Ffi::Bind()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("kv_heads")
                                  .Attr<float>("eps")
                                  .Attr<float>("residual_scale")
                                  .Attr<int64_t>("rank"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(DuplexCrossEntropy, duplex::CrossEntropyImpl,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()    // hidden states [n, D]
                                  .Arg<ffi::Buffer<ffi::F32>>()    // head [V, D]
                                  .Arg<ffi::Buffer<ffi::S32>>()    // targets [n]
                                  .Arg<ffi::Buffer<ffi::F32>>()    // weights [n]
                                  .Arg<ffi::Buffer<ffi::S32>>()    // rows of the head whose gradient is wanted
                                  .Ret<ffi::Buffer<ffi::F32>>()    // loss
                                  .Ret<ffi::Buffer<ffi::F32>>()    // d hidden [n, D], or empty
                                  .Ret<ffi::Buffer<ffi::F32>>()    // d head [V, D], or empty
                                  .Ret<ffi::Buffer<ffi::F32>>()    // d of those rows, or empty
                                  .Attr<int64_t>("vocab")
                                  .Attr<int64_t>("chunk"));
