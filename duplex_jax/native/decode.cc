// CPU kernels for decoding (matrix products, attention), called by XLA through its foreign function interface.
//
// A decode step multiplies a few rows by all weights of the model and reads all cached entries once, so it is bound by
// memory. XLA computes a product of one row on one thread, and repacks the matrix for a few rows; these kernels read
// packed weights in order on all threads, and only each row's own cache entries.

#include "common.h"

namespace duplex {
namespace {

// Products. Weights are in panels [panels, D, 64], so that a thread reads contiguous memory; int8 weights have a scale
// per column.

template <typename W, int R>
void Rows(const W* w, const float* x, int64_t stride, int64_t depth, const float* scales, float* out, int64_t width,
          int64_t columns) {
  for (int at = 0; at < kPanel && at < columns; at += kTile) {
    Vec sums[R][kVecs];
    Tile<R, kVecs, false>(w + at, x, stride, depth, sums);
    float row[kTile];
    for (int r = 0; r < R; ++r) {
      int64_t n = std::min<int64_t>(kTile, columns - at);
      for (int j = 0; j < kVecs; ++j) {
        Vec sum = sums[r][j];
        if (scales != nullptr) sum *= Load(scales + at + j * kLanes);
        Store(row + j * kLanes, sum);
      }
      std::memcpy(out + r * width + at, row, n * sizeof(float));
    }
  }
}

// Rows of x are `stride` apart.
template <typename W>
void Product(const W* w, const float* x, int64_t stride, int64_t rows, int64_t depth, int64_t width,
             const float* scales, float* out) {
  Pool::Get().Run((width + kPanel - 1) / kPanel, rows * depth * width, [&](int64_t panel) {
    const W* own = w + panel * depth * kPanel;
    const float* own_scales = scales == nullptr ? nullptr : scales + panel * kPanel;
    int64_t columns = std::min<int64_t>(kPanel, width - panel * kPanel);
    ForTiles(rows, [&](auto height, int64_t r) {
      constexpr int R = decltype(height)::value;
      Rows<W, R>(own, x + r * stride, stride, depth, own_scales, out + r * width + panel * kPanel, width, columns);
    });
  });
}

// A weight: panels of its type, and scales if int8.
struct Weight {
  const void* data;
  ffi::DataType type;
  const float* scales;
};

ffi::Error Multiply(const Weight& w, const float* x, int64_t stride, int64_t rows, int64_t depth, int64_t width,
                    float* out) {
  switch (w.type) {
    case ffi::F32: Product(static_cast<const float*>(w.data), x, stride, rows, depth, width, nullptr, out); break;
    case ffi::BF16: Product(static_cast<const uint16_t*>(w.data), x, stride, rows, depth, width, nullptr, out); break;
    case ffi::S8: Product(static_cast<const int8_t*>(w.data), x, stride, rows, depth, width, w.scales, out); break;
    default: return ffi::Error::InvalidArgument("weights must be float32, bfloat16 or int8");
  }
  return ffi::Error::Success();
}

Weight AsWeight(const ffi::AnyBuffer& data, const ffi::Buffer<ffi::F32>& scales) {
  return {data.untyped_data(), data.element_type(), scales.typed_data()};
}

ffi::Error MatmulImpl(ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, ffi::Buffer<ffi::F32> scales,
                      ffi::ResultBuffer<ffi::F32> out) {
  Watch watch;
  auto from = x.dimensions(), to = out->dimensions();
  auto error = Multiply(AsWeight(w, scales), x.typed_data(), from[1], from[0], from[1], to[1], out->typed_data());
  watch.Lap(kHead);
  return error;
}

// The cache of a layer: keys [B, K, H, S] and values [B, K, S, H] as float32, bfloat16, or int8 with scales [B, K, S].
template <typename C>
struct Entries {
  C *k, *v;
  float *k_scales, *v_scales;
  int64_t heads, head_dim, slots;

  C* Keys(int64_t row, int64_t head) const { return k + (row * heads + head) * head_dim * slots; }
  C* Values(int64_t row, int64_t head) const { return v + (row * heads + head) * slots * head_dim; }
  float* KeyScales(int64_t row, int64_t head) const { return k_scales + (row * heads + head) * slots; }
  float* ValueScales(int64_t row, int64_t head) const { return v_scales + (row * heads + head) * slots; }
};

inline void Keep(float* to, float x, float) { *to = x; }
inline void Keep(int8_t* to, float x, float scale) { *to = static_cast<int8_t>(std::nearbyint(x / scale)); }
inline void Keep(uint16_t* to, float x, float) {  // rounds to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  *to = static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float Read(float x) { return x; }
inline float Read(int8_t x) { return x; }
inline float Read(uint16_t x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

// Writes one token's key and value of one head into a slot.
template <typename C>
void Append(const Entries<C>& cache, int64_t row, int64_t head, int64_t slot, const float* k, const float* v) {
  float k_scale = 1, v_scale = 1;
  if constexpr (std::is_same_v<C, int8_t>) {
    auto scale = [&](const float* x) {
      float most = 0;
      for (int64_t h = 0; h < cache.head_dim; ++h) most = std::max(most, std::abs(x[h]));
      return std::max(most / 127, std::numeric_limits<float>::min());
    };
    cache.KeyScales(row, head)[slot] = k_scale = scale(k);
    cache.ValueScales(row, head)[slot] = v_scale = scale(v);
  }
  C *keys = cache.Keys(row, head) + slot, *values = cache.Values(row, head) + slot * cache.head_dim;
  for (int64_t h = 0; h < cache.head_dim; ++h) {
    Keep(keys + h * cache.slots, k[h], k_scale);
    Keep(values + h, v[h], v_scale);
  }
}

constexpr int64_t kKeys = 1024;   // keys whose scores are kept at once
constexpr int64_t kQueries = 48;  // queries per task
constexpr int kFew = 3;           // most queries for which keys are not packed

// A task's result for its queries and its part of the keys: an unnormalised softmax.
struct Partial {
  float *out, *top, *total;  // [queries, H], [queries], [queries]
};

// Packs keys [first, first + n) of one head as float32 panels [ceil(n / 64), H, 64], for many queries.
template <typename C>
void PackKeys(const C* keys, int64_t head_dim, int64_t slots, int64_t first, int64_t n, float* panels) {
  constexpr int64_t kSpan = 4 * kPanel;  // panels are multiples of 4 KiB apart: more would evict each other
  for (int64_t begin = 0; begin < n; begin += kSpan)
    for (int64_t h = 0; h < head_dim; ++h) {
      const C* from = keys + h * slots + first;
      float* to = panels + begin * head_dim + h * kPanel;
      int64_t s = begin, end = std::min(n, begin + kSpan);
      for (; s + kPanel <= end; s += kPanel, to += head_dim * kPanel)
        for (int64_t j = 0; j < kPanel; j += kLanes) Store(to + j, Load(from + s + j));
      if (s == end) continue;
      std::fill_n(to, kPanel, 0.0f);
      for (int64_t j = 0; s + j < end; ++j) to[j] = Read(from[s + j]);
    }
}

// Scores [Q, kKeys] of Q queries with n packed keys.
template <int Q>
void PanelScores(const float* q, const float* panels, int64_t head_dim, int64_t n, float* scores) {
  for (int64_t s = 0; s < n; s += kPanel, panels += head_dim * kPanel)
    for (int64_t at = 0; at < kPanel; at += kTile) {
      Vec sums[Q][kVecs];
      Tile<Q, kVecs, false>(panels + at, q, head_dim, head_dim, sums);
      for (int i = 0; i < Q; ++i)
        for (int j = 0; j < kVecs; ++j) Store(scores + i * kKeys + s + at + j * kLanes, sums[i][j]);
    }
}

// The same for few queries with unpacked keys [first, first + n). This is bound by memory: eight dimensions, which are
// far apart, are read at a time, each contiguously, and the sums stay in the core's cache.
template <int Q, typename C>
void Scores(const float* q, const C* keys, int64_t head_dim, int64_t slots, int64_t first, int64_t n, float* scores) {
  constexpr int kDims = 8;
  int64_t whole = head_dim % kDims != 0 ? 0
                  : std::min((n + kLanes - 1) / kLanes * kLanes, (slots - first) / kLanes * kLanes);
  for (int64_t h = 0; h < head_dim && whole > 0; h += kDims) {
    Vec values[Q][kDims];
    for (int i = 0; i < Q; ++i)
      for (int u = 0; u < kDims; ++u) values[i][u] = Splat(q[i * head_dim + h + u]);
    const C* at = keys + h * slots + first;
    for (int64_t j = 0; j < whole; j += kLanes) {
      Vec k[kDims];
      for (int u = 0; u < kDims; ++u) {
        k[u] = Load(at + u * slots + j);
        __builtin_prefetch(at + (u + kDims) * slots + j);
      }
      for (int i = 0; i < Q; ++i) {
        Vec sum = h == 0 ? Vec{} : Load(scores + i * kKeys + j);
        for (int u = 0; u < kDims; ++u) sum += values[i][u] * k[u];
        Store(scores + i * kKeys + j, sum);
      }
    }
  }
  for (int64_t s = whole; s < n; ++s)
    for (int i = 0; i < Q; ++i) {
      float sum = 0;
      for (int64_t h = 0; h < head_dim; ++h) sum += q[i * head_dim + h] * Read(keys[h * slots + first + s]);
      scores[i * kKeys + s] = sum;
    }
}

// Adds probs [Q, kKeys] times values [n, H] to out [Q, H].
template <int Q, typename C>
void Weigh(const float* probs, const C* values, int64_t head_dim, int64_t n, float* out) {
  int64_t h = 0;
  for (; h + kTile <= head_dim; h += kTile) {
    Vec sums[Q][kVecs];
    for (int i = 0; i < Q; ++i)
      for (int j = 0; j < kVecs; ++j) sums[i][j] = Load(out + i * head_dim + h + j * kLanes);
    const C* at = values + h;
    for (int64_t s = 0; s < n; ++s, at += head_dim) {
      Vec v[kVecs];
      for (int j = 0; j < kVecs; ++j) v[j] = Load(at + j * kLanes);
      for (int i = 0; i < Q; ++i) {
        Vec p = InRegister(Splat(probs[i * kKeys + s]));
        for (int j = 0; j < kVecs; ++j) sums[i][j] += p * v[j];
      }
    }
    for (int i = 0; i < Q; ++i)
      for (int j = 0; j < kVecs; ++j) Store(out + i * head_dim + h + j * kLanes, sums[i][j]);
  }
  for (; h < head_dim; ++h)
    for (int i = 0; i < Q; ++i)
      for (int64_t s = 0; s < n; ++s) out[i * head_dim + h] += probs[i * kKeys + s] * Read(values[s * head_dim + h]);
}

// Attention of Q queries, each over the keys before its own limit, to keys [first, last), at most kKeys of them, which
// are packed for many queries.
template <int Q, typename C>
void Attend(const Entries<C>& cache, int64_t row, int64_t head, const float* q, const int64_t* limits, int64_t first,
            int64_t last, const float* panels, Partial into) {
  const C *keys = cache.Keys(row, head), *values = cache.Values(row, head);
  int64_t H = cache.head_dim;
  alignas(64) float scores[Q * kKeys];
  for (int i = 0; i < Q; ++i) {
    into.top[i] = -std::numeric_limits<float>::infinity();
    into.total[i] = 0;
    std::fill_n(into.out + i * H, H, 0.0f);
  }
  int64_t n = std::min(last, *std::max_element(limits, limits + Q)) - first;
  if (n <= 0) return;
  if (panels != nullptr) {
    PanelScores<Q>(q, panels, H, n, scores);
  } else if constexpr (Q <= kFew) {
    Scores<Q, C>(q, keys, H, cache.slots, first, n, scores);
  }
  for (int i = 0; i < Q; ++i) {
    float* own = scores + i * kKeys;
    int64_t seen = std::clamp<int64_t>(limits[i] - first, 0, n);
    std::fill(own + seen, own + n, 0.0f);
    if (seen == 0) continue;
    if constexpr (std::is_same_v<C, int8_t>) {
      const float* scales = cache.KeyScales(row, head) + first;
      for (int64_t s = 0; s < seen; ++s) own[s] *= scales[s];
    }
    float top = Max(own, seen, into.top[i]);
    Map(own, own, seen, [&](int64_t, Vec x) { return Exp(x - Splat(top)); });
    into.top[i] = top;
    into.total[i] = Sum(own, seen);
    if constexpr (std::is_same_v<C, int8_t>) {
      const float* scales = cache.ValueScales(row, head) + first;
      for (int64_t s = 0; s < seen; ++s) own[s] *= scales[s];
    }
  }
  Weigh<Q, C>(scores, values + first * H, H, n, into.out);
}

// Tokens of one row: index of the first, their number, the row of the cache, and its length before them.
struct Run {
  int64_t token, number, row, length;
};

// Attention of queries [n, N, H], rotated and scaled, to all entries of their rows, their own included.
template <typename C>
void AttendAll(const Entries<C>& cache, const std::vector<Run>& runs, int64_t num_heads, const float* q, float* out) {
  int64_t H = cache.head_dim, group = num_heads / cache.heads;
  struct Task {
    const Run* run;
    int64_t head, query, queries, first, last, part, parts, place;
  };
  std::vector<Task> tasks;
  int64_t held = 0, work = 0;  // queries of all tasks; see Pool::Run
  for (const Run& run : runs) work += num_heads * run.number * (run.length + run.number) * H;
  for (const Run& run : runs) {
    int64_t queries = run.number * group, keys = run.length + run.number;
    // Keys are split among tasks, too, independently of other rows, so that a row's sums do not depend on the batch.
    int64_t step = keys < 2 * kKeys ? kKeys / 2 : kKeys, parts = (keys + step - 1) / step;
    for (int64_t head = 0; head < cache.heads; ++head)
      for (int64_t query = 0; query < queries; query += kQueries) {
        int64_t number = std::min(kQueries, queries - query);
        for (int64_t part = 0; part < parts; ++part) {
          tasks.push_back({&run, head, query, number, part * step, std::min(keys, (part + 1) * step), part, parts, held});
          held += number;
        }
      }
  }
  Floats numbers(held * (H + 2));
  float *sums = numbers.data(), *tops = sums + held * H, *totals = tops + held;
  // A task's queries belong to one key head: `group` adjacent queries of each token.
  auto token_head = [&](const Task& task, int64_t i) {
    int64_t query = task.query + i;
    return (task.run->token + query / group) * num_heads + task.head * group + query % group;
  };
  Pool::Get().Run(tasks.size(), work, [&](int64_t number) {
    const Task& task = tasks[number];
    Floats own(task.queries * H);
    std::vector<int64_t> limits(task.queries);
    for (int64_t i = 0; i < task.queries; ++i) {
      std::memcpy(own.data() + i * H, q + token_head(task, i) * H, H * sizeof(float));
      limits[i] = task.run->length + (task.query + i) / group + 1;
    }
    int64_t keys = task.last - task.first;
    std::unique_ptr<Floats> panels;
    if (task.queries > kFew) {
      panels = std::make_unique<Floats>((keys + kPanel - 1) / kPanel * kPanel * H);
      PackKeys(cache.Keys(task.run->row, task.head), H, cache.slots, task.first, keys, panels->data());
    }
    ForTiles(task.queries, [&](auto height, int64_t i) {
      constexpr int Q = decltype(height)::value;
      int64_t place = task.place + i;
      Attend<Q, C>(cache, task.run->row, task.head, own.data() + i * H, limits.data() + i, task.first, task.last,
                   panels == nullptr ? nullptr : panels->data(), {sums + place * H, tops + place, totals + place});
    });
  });
  for (size_t at = 0; at < tasks.size(); at += tasks[at].parts) {
    const Task& task = tasks[at];
    for (int64_t i = 0; i < task.queries; ++i) {
      float* to = out + token_head(task, i) * H;
      float top = -std::numeric_limits<float>::infinity(), total = 0;
      for (int64_t p = 0; p < task.parts; ++p) top = std::max(top, tops[tasks[at + p].place + i]);
      std::fill_n(to, H, 0.0f);
      for (int64_t p = 0; p < task.parts; ++p) {
        int64_t place = tasks[at + p].place + i;
        float weight = std::exp(tops[place] - top);
        total += weight * totals[place];
        for (int64_t h = 0; h < H; ++h) to[h] += weight * sums[place * H + h];
      }
      for (int64_t h = 0; h < H; ++h) to[h] /= total;
    }
  }
}

struct Layer {
  const float *attn_norm, *mlp_norm;
  Weight qkv, o, gate_up, down;
  int64_t hidden, mlp, num_heads;
  float eps, residual_scale;
};

// One layer on tokens x [n, D], in place; their keys and values are added to the cache.
template <typename C>
ffi::Error Block(const Layer& layer, const Entries<C>& cache, const std::vector<Run>& runs, const float* cos,
                 const float* sin, int64_t n, float* x, Watch& watch) {
  int64_t D = layer.hidden, F = layer.mlp, N = layer.num_heads, K = cache.heads, H = cache.head_dim;
  int64_t width = (N + 2 * K) * H;
  Floats y(n * D), qkv(n * width), attended(n * N * H), gates(n * 2 * F), q(n * N * H);
  ForTokens(n, D, [&](int64_t t) { RmsNorm(&x[t * D], layer.attn_norm, layer.eps, D, &y[t * D]); });
  watch.Lap(kSmall);
  if (auto e = Multiply(layer.qkv, y.data(), D, n, D, width, qkv.data()); e.failure()) return e;
  watch.Lap(kProducts);
  std::vector<std::pair<int64_t, int64_t>> places(n);  // row and slot of each token
  for (const Run& run : runs)
    for (int64_t i = 0; i < run.number; ++i) places[run.token + i] = {run.row, run.length + i};
  float scale = 1 / std::sqrt(static_cast<float>(H));
  ForTokens(n, width, [&](int64_t t) {
    float* own = &qkv[t * width];
    for (int64_t head = 0; head < N + K; ++head) {
      float* a = own + head * H;
      for (int64_t h = 0; h < H / 2; ++h) {
        float c = cos[t * (H / 2) + h], s = sin[t * (H / 2) + h], low = a[h], high = a[h + H / 2];
        a[h] = low * c - high * s;
        a[h + H / 2] = high * c + low * s;
      }
    }
    for (int64_t i = 0; i < N * H; ++i) q[t * N * H + i] = own[i] * scale;
    for (int64_t head = 0; head < K; ++head)
      Append(cache, places[t].first, head, places[t].second, own + (N + head) * H, own + (N + K + head) * H);
  });
  watch.Lap(kSmall);
  AttendAll(cache, runs, N, q.data(), attended.data());
  watch.Lap(kAttention);
  if (auto e = Multiply(layer.o, attended.data(), N * H, n, N * H, D, y.data()); e.failure()) return e;
  watch.Lap(kProducts);
  ForTokens(n, D, [&](int64_t t) {
    for (int64_t i = t * D; i < (t + 1) * D; ++i) x[i] += y[i] * layer.residual_scale;
    RmsNorm(&x[t * D], layer.mlp_norm, layer.eps, D, &y[t * D]);
  });
  watch.Lap(kSmall);
  if (auto e = Multiply(layer.gate_up, y.data(), D, n, D, 2 * F, gates.data()); e.failure()) return e;
  watch.Lap(kProducts);
  // SwiGLU, in place of the first half of each token's gates.
  ForTokens(n, 10 * F, [&](int64_t t) {
    float* gate = &gates[t * 2 * F];
    Map(gate, gate, F, [&](int64_t i, Vec g) {
      Vec up = Splat(0.0f);
      if (i + kLanes <= F) up = Load(gate + F + i); else up[0] = gate[F + i];
      return g / (Splat(1.0f) + Exp(-g)) * up;
    });
  });
  watch.Lap(kSmall);
  if (auto e = Multiply(layer.down, gates.data(), 2 * F, n, F, D, y.data()); e.failure()) return e;
  watch.Lap(kProducts);
  ForTokens(n, D, [&](int64_t t) {
    for (int64_t i = t * D; i < (t + 1) * D; ++i) x[i] += y[i] * layer.residual_scale;
  });
  return ffi::Error::Success();
}

template <typename C>
Entries<C> AsEntries(ffi::Result<ffi::AnyBuffer>& k, ffi::Result<ffi::AnyBuffer>& v,
                     ffi::ResultBuffer<ffi::F32>& k_scales, ffi::ResultBuffer<ffi::F32>& v_scales) {
  auto sizes = v->dimensions();
  return {static_cast<C*>(k->untyped_data()), static_cast<C*>(v->untyped_data()), k_scales->typed_data(),
          v_scales->typed_data(), sizes[1], sizes[3], sizes[2]};
}

ffi::Error BlockImpl(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                     ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> counts, ffi::Buffer<ffi::S32> rows,
                     ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::F32> attn_norm, ffi::AnyBuffer qkv,
                     ffi::Buffer<ffi::F32> qkv_scales, ffi::AnyBuffer o, ffi::Buffer<ffi::F32> o_scales,
                     ffi::Buffer<ffi::F32> mlp_norm, ffi::AnyBuffer gate_up, ffi::Buffer<ffi::F32> gate_up_scales,
                     ffi::AnyBuffer down, ffi::Buffer<ffi::F32> down_scales, ffi::AnyBuffer, ffi::AnyBuffer,
                     ffi::Buffer<ffi::F32>, ffi::Buffer<ffi::F32>, ffi::ResultBuffer<ffi::F32> out,
                     ffi::Result<ffi::AnyBuffer> k, ffi::Result<ffi::AnyBuffer> v, ffi::ResultBuffer<ffi::F32> k_scales,
                     ffi::ResultBuffer<ffi::F32> v_scales, int64_t num_heads, float eps, float residual_scale) {
  Watch watch;
  int64_t D = x.dimensions()[1], half = cos.dimensions()[1];
  Layer layer{attn_norm.typed_data(), mlp_norm.typed_data(), AsWeight(qkv, qkv_scales), AsWeight(o, o_scales),
              AsWeight(gate_up, gate_up_scales), AsWeight(down, down_scales), D, down.dimensions()[1], num_heads, eps,
              residual_scale};
  // Tokens that belong to no row are left out.
  std::vector<Run> runs;
  std::vector<int64_t> tokens;
  for (size_t r = 0; r < counts.element_count(); ++r) {
    int64_t n = counts.typed_data()[r];
    if (n <= 0) continue;
    runs.push_back({static_cast<int64_t>(tokens.size()), n, rows.typed_data()[r], lengths.typed_data()[r]});
    for (int64_t i = 0; i < n; ++i) tokens.push_back(starts.typed_data()[r] + i);
  }
  int64_t n = tokens.size();
  Floats own(n * D), own_cos(n * half), own_sin(n * half);
  auto gather = [&](const float* from, int64_t width, const Floats& to) {
    for (int64_t t = 0; t < n; ++t) std::memcpy(&to[t * width], from + tokens[t] * width, width * sizeof(float));
  };
  gather(x.typed_data(), D, own);
  gather(cos.typed_data(), half, own_cos);
  gather(sin.typed_data(), half, own_sin);
  ffi::Error error = ffi::Error::Success();
  auto run = [&](auto type) {
    using C = decltype(type);
    error = Block(layer, AsEntries<C>(k, v, k_scales, v_scales), runs, own_cos.data(), own_sin.data(), n, own.data(),
                  watch);
  };
  switch (k->element_type()) {
    case ffi::F32: run(float()); break;
    case ffi::BF16: run(uint16_t()); break;
    case ffi::S8: run(int8_t()); break;
    default: return ffi::Error::InvalidArgument("the cache must be float32, bfloat16 or int8");
  }
  std::fill_n(out->typed_data(), out->element_count(), 0.0f);
  for (int64_t t = 0; t < n; ++t) std::memcpy(out->typed_data() + tokens[t] * D, &own[t * D], D * sizeof(float));
  watch.Lap(kSmall);
  return error;
}

}  // namespace
}  // namespace duplex

// Nanoseconds by part, over all calls of this process.
extern "C" void DuplexSpent(int64_t* into) { std::copy(duplex::spent.begin(), duplex::spent.end(), into); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DuplexMatmul, duplex::MatmulImpl,
    ffi::Ffi::Bind()
        .Arg<ffi::Buffer<ffi::F32>>()                        // x [T, D]
        .Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::F32>>()  // panels and scales of a weight
        .Ret<ffi::Buffer<ffi::F32>>());                      // [T, F]

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    DuplexBlock, duplex::BlockImpl,
    ffi::Ffi::Bind()
        .Arg<ffi::Buffer<ffi::F32>>()                               // x [P, D]
        .Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>()  // cosines and sines [P, H / 2]
        .Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::S32>>()  // of R rows: start and number of tokens
        .Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::Buffer<ffi::S32>>()  // index in the cache, and length
        .Arg<ffi::Buffer<ffi::F32>>()                               // norm before attention
        .Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::F32>>()         // q, k, v
        .Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::F32>>()         // o
        .Arg<ffi::Buffer<ffi::F32>>()                               // norm before SwiGLU
        .Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::F32>>()         // gate, up
        .Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::F32>>()         // down
        .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()                // keys and values, returned updated
        .Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::F32>>()  // and their scales
        .Ret<ffi::Buffer<ffi::F32>>()                               // x
        .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
        .Ret<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>()
        .Attr<int64_t>("num_heads")
        .Attr<float>("eps")
        .Attr<float>("residual_scale"));
