// The arithmetic that decides bits, for CUDA devices: pixels to values, the exact sum, its mean,
// AdamW and CRC-64.
//
// Each kernel gives the bits of its counterpart in Rust (crates/recipe: reduce.rs, adamw.rs,
// digest.rs, step.rs), whatever the number of threads: elements do not meet, but in maxima of integers and in
// flags. Every operation is a single IEEE operation with one rounding; NVRTC must be told
// --fmad=false, and where a mistake would hide, the intrinsics say it again.
//
// The file is C as well: with LACUNA_HOST defined a C compiler makes plain functions of the kernels.
// A call does the work of one thread, and tests make all calls of a launch one after the other.
// Where threads meet (RAISE, RAISE_TO) a plain operation is then as good as an atomic one; all
// others write their own elements.

#ifdef LACUNA_HOST
#include <math.h>
#include <string.h>
typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned char u8;
#define KERNEL void
// Which thread of how many the next calls on this thread of the host are.
static _Thread_local u64 host_thread = 0, host_threads = 1;
void lacuna_host_thread(u64 thread, u64 threads) {
  host_thread = thread;
  host_threads = threads;
}
#define THREAD host_thread
#define THREADS host_threads
#define MUL(a, b) ((a) * (b))
#define ADD(a, b) ((a) + (b))
#define SUB(a, b) ((a) - (b))
#define DIV(a, b) ((a) / (b))
#define SQRT(a) sqrtf(a)
#define RAISE(place, bit) (*(place) |= (bit))
#define RAISE_TO(place, value) (*(place) = *(place) > (value) ? *(place) : (value))
static u32 bits_of(float x) {
  u32 bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
#else
typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned char u8;
#define KERNEL extern "C" __global__ void
#define THREAD ((u64)blockIdx.x * blockDim.x + threadIdx.x)
#define THREADS ((u64)gridDim.x * blockDim.x)
#define MUL(a, b) __fmul_rn(a, b)
#define ADD(a, b) __fadd_rn(a, b)
#define SUB(a, b) __fsub_rn(a, b)
#define DIV(a, b) __fdiv_rn(a, b)
#define SQRT(a) __fsqrt_rn(a)
#define RAISE(place, bit) atomicOr(place, bit)
// It only rises: most values are not above what is there, and need no atomic operation.
#define RAISE_TO(place, value) \
  do { \
    const u32 raised = (value); \
    if (raised > *(volatile u32 *)(place)) atomicMax(place, raised); \
  } while (0)
static __device__ u32 bits_of(float x) { return __float_as_uint(x); }
#endif

#define EACH(i, n) u64 i = THREAD; i < (n); i += THREADS

// Flags of quantise_add.
#define OVERFLOW 1u
#define NON_FINITE 2u

// Adds round_ties_even(f64(grad) * scale) to each sum; raises flags where that is impossible.
KERNEL quantise_add(const float *grad, i64 *sums, u32 *flags, u64 n, double scale, double limit) {
  for (EACH(i, n)) {
    const float g = grad[i];
    if ((bits_of(g) & 0x7f800000u) == 0x7f800000u) {
      RAISE(flags, NON_FINITE);
      continue;
    }
    const double x = rint((double)g * scale);
    if (fabs(x) > limit) {
      RAISE(flags, OVERFLOW);
    } else {
      sums[i] += (i64)x;
    }
  }
}

// Writes f32(f64(sum) * scale / slots), and raises the largest magnitude's bits in max_bits.
KERNEL mean_of(const i64 *sums, float *mean, u32 *max_bits, u64 n, double scale, double slots) {
  u32 most = 0;
  for (EACH(i, n)) {
    const float value = (float)((double)sums[i] * scale / slots);
    const u32 magnitude = bits_of(value) & 0x7fffffffu;
    mean[i] = value;
    most = magnitude > most ? magnitude : most;
  }
  // Once a thread: all of them read and write one word.
  RAISE_TO(max_bits, most);
}

// Sums the squares of a stretch each: part k of n_parts takes every n_parts-th element from k on.
// The number of parts, not of threads, decides the bits.
KERNEL squares(const float *values, double *parts, u64 n, u64 n_parts) {
  for (EACH(k, n_parts)) {
    double sum = 0.0;
    for (u64 i = k; i < n; i += n_parts) {
      const double x = (double)values[i];
      sum += x * x;
    }
    parts[k] = sum;
  }
}

// One update of AdamW in place.
KERNEL adamw(float *param, float *exp_avg, float *exp_avg_sq, const float *grad, u64 n, float keep,
             float beta1, float rest1, float beta2, float rest2, float step_size, float root,
             float eps) {
  for (EACH(i, n)) {
    const float g = grad[i];
    const float m = ADD(MUL(beta1, exp_avg[i]), MUL(rest1, g));
    const float v = ADD(MUL(beta2, exp_avg_sq[i]), MUL(rest2, MUL(g, g)));
    const float denominator = ADD(MUL(SQRT(v), root), eps);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    param[i] = SUB(MUL(param[i], keep), MUL(step_size, DIV(m, denominator)));
  }
}

// Turns bytes [b, h, w, c] into values [b, c, h, w] by a table of 256 values for each channel.
KERNEL normalise(const u8 *pixels, const float *table, float *values, u64 n, u64 plane,
                 u64 channels) {
  for (EACH(i, n)) {
    const u64 image = i / (plane * channels);
    const u64 channel = i / plane % channels;
    const u64 place = i % plane;
    values[i] = table[channel * 256 + pixels[(image * plane + place) * channels + channel]];
  }
}

// CRC-64/NVME of each piece of `piece` bytes (the last may be shorter; pieces are multiples of 8).
// `tables` holds eight tables of 256 values for eight bytes at once. `bytes` lies at a multiple of
// 4 and no more: a tensor begins behind another one of any number of f32.
KERNEL crc64_pieces(const u8 *bytes, const u64 *tables, u64 *crcs, u64 n, u64 piece, u64 n_pieces) {
  for (EACH(k, n_pieces)) {
    const u64 start = k * piece;
    const u64 end = start + piece < n ? start + piece : n;
    u64 crc = ~0ULL;
    u64 at = start;
    for (; at + 8 <= end; at += 8) {
      const u32 *half = (const u32 *)(bytes + at);
      const u64 word = crc ^ ((u64)half[0] | (u64)half[1] << 32);
      crc = tables[7 * 256 + (word & 0xff)] ^ tables[6 * 256 + (word >> 8 & 0xff)] ^
            tables[5 * 256 + (word >> 16 & 0xff)] ^ tables[4 * 256 + (word >> 24 & 0xff)] ^
            tables[3 * 256 + (word >> 32 & 0xff)] ^ tables[2 * 256 + (word >> 40 & 0xff)] ^
            tables[256 + (word >> 48 & 0xff)] ^ tables[word >> 56];
    }
    for (; at < end; at += 1) {
      crc = tables[(crc ^ bytes[at]) & 0xff] ^ (crc >> 8);
    }
    crcs[k] = ~crc;
  }
}
