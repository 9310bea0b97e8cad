// Common parts of the CPU kernels: vectors, threads, memory, and the small functions of a layer.
//
// Vectors use GCC's extension, so that the same source works for AVX-512, AVX2 and NEON.

#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace duplex {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef int8_t ByteVec __attribute__((vector_size(kLanes)));
typedef uint16_t ShortVec __attribute__((vector_size(kLanes * 2)));

// Columns of a panel of packed weights, and columns and rows of a tile, whose sums fill the registers.
constexpr int kPanel = 64;
constexpr int kTile = kLanes == 16 ? 64 : 2 * kLanes;
constexpr int kVecs = kTile / kLanes;
constexpr int kRows = kLanes == 4 ? 4 : 6;

// Threads.

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Runs the parts of a job on all cores. Helpers spin for a while before they sleep: jobs come every few microseconds,
// and waking a thread takes fifty.
class Pool {
 public:
  static Pool& Get() {
    static Pool* pool = new Pool;  // never destroyed, because its threads may outlive main
    return *pool;
  }

  // Calls part(0) ... part(parts - 1) in any order and returns when all are done. Not reentrant; callers wait in line.
  // `work` is the approximate number of values read or multiplied: small jobs are faster on one thread.
  void Run(int64_t parts, int64_t work, const std::function<void(int64_t)>& part) {
    if (helpers_ == 0 || parts <= 1 || work < (1 << 15)) {
      for (int64_t i = 0; i < parts; ++i) part(i);
      return;
    }
    std::lock_guard<std::mutex> one_at_a_time(callers_);
    part_ = &part;
    parts_ = parts;
    next_.store(0, std::memory_order_relaxed);
    running_.store(helpers_, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load() > 0) wake_.notify_all();
    Work(part, parts);
    for (int spins = 0; running_.load(std::memory_order_acquire) > 0; ++spins) {
      if (spins < 4000) pause(); else std::this_thread::yield();
    }
  }

 private:
  Pool() {
    int cores = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) cores = CPU_COUNT(&set);
#endif
    helpers_ = std::max(0, cores - 1);
    for (int i = 0; i < helpers_; ++i) std::thread([this] { Help(); }).detach();
  }

  void Work(const std::function<void(int64_t)>& part, int64_t parts) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < parts;) part(i);
  }

  void Help() {
    uint64_t done = 0;
    for (;;) {
      int spins = 0;
      while (job_.load(std::memory_order_acquire) == done) {
        if (++spins < 20000) {
          pause();
          continue;
        }
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return job_.load(std::memory_order_acquire) != done; });
        sleeping_.fetch_sub(1);
      }
      ++done;
      Work(*part_, parts_);
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  int helpers_;
  std::mutex callers_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> job_{0};
  std::atomic<int> running_{0}, sleeping_{0};
  std::atomic<int64_t> next_{0};
  const std::function<void(int64_t)>* part_ = nullptr;
  int64_t parts_ = 0;
};

// Time of all calls by part, in nanoseconds; benchmarks read it before and after.
enum Part { kProducts, kAttention, kSmall, kHead, kParts };
inline std::array<std::atomic<int64_t>, kParts> spent{};

class Watch {
 public:
  // Adds the time since the last lap, or since construction, to a part.
  void Lap(Part part) {
    auto now = Clock::now();
    spent[part] += std::chrono::duration_cast<std::chrono::nanoseconds>(now - last_).count();
    last_ = now;
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point last_ = Clock::now();
};

// Uninitialised memory for one call.
class Floats {
 public:
  explicit Floats(int64_t n) : data_(new float[std::max<int64_t>(n, 1)]) {}
  float* data() const { return data_.get(); }
  float& operator[](int64_t i) const { return data_[i]; }

 private:
  std::unique_ptr<float[]> data_;
};

// Loads of the storage types of weights and entries.

inline Vec Load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// Narrow types use intrinsics: __builtin_convertvector emits four instructions here and takes 80% of the run time.

inline Vec Load(const uint16_t* p) {  // bfloat16
#if defined(__AVX512F__)
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return (Vec)_mm512_slli_epi32(wide, 16);
#elif defined(__AVX2__)
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
  ShortVec s;
  std::memcpy(&s, p, sizeof(s));
  return (Vec)(__builtin_convertvector(s, IntVec) << 16);
#endif
}

inline Vec Load(const int8_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  ByteVec b;
  std::memcpy(&b, p, sizeof(b));
  return __builtin_convertvector(b, Vec);
#endif
}

inline void Store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
inline Vec Splat(float x) { return x - Vec{}; }  // x - 0 is x, even for -0, and costs nothing

// Keeps a vector in a register; otherwise the compiler broadcasts it from memory for each product.
inline Vec InRegister(Vec v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// Calls body(height, first) on tiles of n rows, the height being a constant of at most kRows. Tiles have about equal
// height, because low ones would be bound by the latency of their sums.
template <typename Body>
inline void ForTiles(int64_t n, Body body) {
  int64_t first = 0;
  for (int64_t tiles = (n + kRows - 1) / kRows; tiles > 0; --tiles) {
    int64_t height = (n - first + tiles - 1) / tiles;
    switch (height) {
      case 6: body(std::integral_constant<int, 6>(), first); break;
      case 5: body(std::integral_constant<int, 5>(), first); break;
      case 4: body(std::integral_constant<int, 4>(), first); break;
      case 3: body(std::integral_constant<int, 3>(), first); break;
      case 2: body(std::integral_constant<int, 2>(), first); break;
      default: body(std::integral_constant<int, 1>(), first); break;
    }
    first += height;
  }
}

// Dot products of R rows of x with kLanes * V columns of a panel [depth, 64]. Rows of x are `stride` apart or, if
// packed, interleaved by depth.
constexpr int64_t kAhead = 12;  // prefetch distance from L2 to L1, in rows of the panel
template <int R, int V, bool kPacked, typename W>
inline void Tile(const W* w, const float* x, int64_t stride, int64_t depth, Vec (&sums)[R][V]) {
  for (auto& row : sums)
    for (auto& sum : row) sum = Vec{};
  for (int64_t d = 0; d < depth; ++d, w += kPanel) {
    Vec columns[V];
    for (int j = 0; j < V; ++j) {
      columns[j] = Load(w + j * kLanes);
      __builtin_prefetch(w + kAhead * kPanel + j * kLanes);
    }
    for (int r = 0; r < R; ++r) {
      Vec value = InRegister(Splat(kPacked ? x[d * R + r] : x[r * stride + d]));
      for (int j = 0; j < V; ++j) sums[r][j] += value * columns[j];
    }
  }
}

// exp to about one unit in the last place: 2^n times a polynomial, |x - n ln 2| <= ln 2 / 2 (Cephes' coefficients).
inline Vec Exp(Vec x) {
  x = x < Splat(-87.0f) ? Splat(-87.0f) : x;
  x = x > Splat(88.0f) ? Splat(88.0f) : x;
  IntVec n = __builtin_convertvector(x * Splat(1.44269504f) + (x < Splat(0.0f) ? Splat(-0.5f) : Splat(0.5f)), IntVec);
  Vec whole = __builtin_convertvector(n, Vec);
  x = x - whole * Splat(0.693359375f) + whole * Splat(2.12194440e-4f);
  Vec y = Splat(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = y * x + Splat(c);
  y = y * x * x + x + Splat(1.0f);
  return y * (Vec)((n + 127) << 23);
}

inline float Sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
#endif
}

inline Vec Larger(Vec a, Vec b) { return a > b ? a : b; }

inline float Max(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = std::max(most, v[i]);
  return most;
#endif
}

// Four vectors at a time, to hide the latency of additions.

inline float Sum(const float* x, int64_t n) {
  Vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) sums[j] += Load(x + i + j * kLanes);
  float total = Sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) total += x[i];
  return total;
}

inline float Max(const float* x, int64_t n, float most) {
  Vec tops[4] = {Splat(most), Splat(most), Splat(most), Splat(most)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) tops[j] = Larger(tops[j], Load(x + i + j * kLanes));
  most = Max(Larger(Larger(tops[0], tops[1]), Larger(tops[2], tops[3])));
  for (; i < n; ++i) most = std::max(most, x[i]);
  return most;
}

// Calls body(i, vector) on kLanes of n floats at a time, at the end on single ones, and stores its results.
template <typename Body>
inline void Map(const float* from, float* to, int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) Store(to + i, body(i, Load(from + i)));
  for (; i < n; ++i) to[i] = body(i, Splat(from[i]))[0];
}

// Calls body(token) for n tokens on all cores; `width` is the approximate work per token.
template <typename Body>
void ForTokens(int64_t n, int64_t width, Body body) {
  constexpr int64_t kBlock = 16;
  Pool::Get().Run((n + kBlock - 1) / kBlock, n * width, [&](int64_t block) {
    for (int64_t i = block * kBlock; i < std::min(n, (block + 1) * kBlock); ++i) body(i);
  });
}

inline void RmsNorm(const float* x, const float* weight, float eps, int64_t width, float* out) {
  Vec sum = Vec{};
  float rest = 0;
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) sum += Load(x + i) * Load(x + i);
  for (; i < width; ++i) rest += x[i] * x[i];
  float factor = 1.0f / std::sqrt((Sum(sum) + rest) / width + eps);
  for (i = 0; i < width; ++i) out[i] = x[i] * factor * weight[i];
}

}  // namespace duplex
