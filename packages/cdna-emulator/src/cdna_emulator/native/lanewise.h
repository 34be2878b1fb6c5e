// Handlers that compute one result per lane from one to three sources, built from a function.
//
// `lanewise32<2, f>` is the handler of an instruction that writes f(source 0, source 1) of every
// lane. Operand 0 is the destination and the sources follow it.
#pragma once

#include "operands.h"

namespace cdna {

// Applies F to the lanes of N arrays.
template <int N, auto F, class T>
inline void apply_lanes(const T* const* s, T* r) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if constexpr (N == 1) {
      r[lane] = static_cast<T>(F(s[0][lane]));
    } else if constexpr (N == 2) {
      r[lane] = static_cast<T>(F(s[0][lane], s[1][lane]));
    } else {
      r[lane] = static_cast<T>(F(s[0][lane], s[1][lane], s[2][lane]));
    }
  }
}

template <int N, auto F>
void lanewise32(Wave& w, const Instruction& in) {
  Lanes buffer[N], result;
  const uint32_t* s[N];
  for (int k = 0; k < N; ++k) s[k] = fetch32(w, in, in.op[1 + k], k, buffer[k]);
  apply_lanes<N, F, uint32_t>(s, result.lane);
  write32(w, in, in.op[0], result.lane);
}

// Sources and result have 16 bits; F gets them with zeros above, and what it returns above them is
// dropped.
template <int N, auto F>
void lanewise16(Wave& w, const Instruction& in) {
  Lanes buffer[N], result;
  const uint32_t* s[N];
  for (int k = 0; k < N; ++k) s[k] = fetch16(w, in, in.op[1 + k], k, buffer[k]);
  apply_lanes<N, F, uint32_t>(s, result.lane);
  for (int lane = 0; lane < kLanes; ++lane) result.lane[lane] &= 0xffff;
  write16(w, in, in.op[0], result.lane);
}

// The clamp bit of an integer instruction asks for the saturating function.
template <int N, auto F, auto Saturating>
void clamped32(Wave& w, const Instruction& in) {
  if (in.flags & kClamp) {
    lanewise32<N, Saturating>(w, in);
  } else {
    lanewise32<N, F>(w, in);
  }
}

template <int N, auto F, auto Saturating>
void clamped16(Wave& w, const Instruction& in) {
  if (in.flags & kClamp) {
    lanewise16<N, Saturating>(w, in);
  } else {
    lanewise16<N, F>(w, in);
  }
}

inline uint32_t clamp_signed32(int64_t x) {
  return static_cast<uint32_t>(x > INT32_MAX ? INT32_MAX : x < INT32_MIN ? INT32_MIN : x);
}

inline uint32_t clamp_unsigned32(int64_t x) {
  return static_cast<uint32_t>(x > UINT32_MAX ? UINT32_MAX : x < 0 ? 0 : x);
}

inline uint32_t clamp_signed16(int32_t x) {
  return static_cast<uint32_t>(x > INT16_MAX ? INT16_MAX : x < INT16_MIN ? INT16_MIN : x);
}

inline uint32_t clamp_unsigned16(int32_t x) {
  return static_cast<uint32_t>(x > UINT16_MAX ? UINT16_MAX : x < 0 ? 0 : x);
}

inline int32_t signed16(uint32_t x) { return static_cast<int16_t>(x); }

}  // namespace cdna
