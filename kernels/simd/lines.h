// How a vector's values find their places on the lines of the dynamic map's encoder, see codebook.h: by tables of 16
// and 32 entries, or of 8. Each instruction set names the faster one as its `Lines`.
#pragma once

#include <cstdint>

#include "codebook.h"

namespace opt8bit {
namespace {

// Both: `shifted` values from normalized ones that are at least 0; the `line` of each; its `place` there, a code and a
// fraction in fixed point; the line's `cap` in the same. A place whose fraction is under kEncoderSlack may be one code
// off.

template <class Simd, bool kSigned>
class WideLines {
 public:
  using Floats = typename Simd::Floats;
  using Ints = typename Simd::Ints;

  explicit WideLines(const DynamicMap& map)
      : line_end_(Simd::table32(map.encoder.line_end)),
        slope_(Simd::table16(map.encoder.slope)),
        intercept_(Simd::table16(map.encoder.intercept)),
        cap_(Simd::table16(map.encoder.cap)) {}

  static Floats shifted(Floats value, Floats reciprocal) {
    return Simd::fma(value, reciprocal, Simd::broadcast(kEncoderShift));
  }
  Ints line(Floats x) const {
    const Floats line_end = Simd::lookup(line_end_, Simd::exponent(x));
    return Simd::add_where(Simd::greater_or_nan(x, line_end), Simd::bits(line_end), Simd::broadcast(-1));
  }
  Ints place(Floats x, Ints line) const {
    const Ints sum = Simd::bits(Simd::fma(x, Simd::lookup(slope_, line), Simd::lookup(intercept_, line)));
    return kSigned ? sum : Simd::add(sum, sum);
  }
  Ints cap(Ints line) const { return Simd::bits(Simd::lookup(cap_, line)); }

 private:
  typename Simd::Table32 line_end_;
  typename Simd::Table16 slope_, intercept_, cap_;
};

template <class Simd, bool kSigned>
class NarrowLines {
 public:
  using Floats = typename Simd::Floats;
  using Ints = typename Simd::Ints;

  explicit NarrowLines(const DynamicMap& map)
      : line_end_(Simd::table8(map.narrow_encoder.line_end)),
        slope_(Simd::table8(map.narrow_encoder.slope)),
        intercept_(Simd::table8(map.narrow_encoder.intercept)),
        cap_(Simd::table8(map.narrow_encoder.cap)),
        one_begin_(Simd::broadcast(map.narrow_encoder.one_begin)) {}

  static Floats shifted(Floats value, Floats reciprocal) {
    const Floats shift = Simd::broadcast(kNarrowEncoderShift);
    return Simd::max(Simd::fma(value, reciprocal, shift), shift);  // a NaN is taken for zero
  }
  Ints line(Floats x) const {
    const Ints least = Simd::template times_fraction<kLog10Of2>(Simd::exponent(x));
    return Simd::add_where(Simd::greater(x, Simd::lookup(line_end_, least)), least, Simd::broadcast(1));
  }
  Ints place(Floats x, Ints line) const {
    const Ints sum = Simd::bits(Simd::fma(x, Simd::lookup(slope_, line), Simd::lookup(intercept_, line)));
    return Simd::add_where(Simd::greater(x, one_begin_), kSigned ? sum : Simd::add(sum, sum),
                           Simd::broadcast(kQuarter));
  }
  Ints cap(Ints line) const { return Simd::bits(Simd::lookup(cap_, line)); }

 private:
  typename Simd::Table8 line_end_, slope_, intercept_, cap_;
  const Floats one_begin_;
};

}  // namespace
}  // namespace opt8bit
