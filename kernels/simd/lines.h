// How a vector's values find their places on the lines of the dynamic map's encoder, see codebook.h: by tables of 16
// and 32 entries, or of 8, in registers; or by a large one in memory. Each instruction set names the fastest as its
// `Lines`.
#pragma once

#include <cstdint>

#include "codebook.h"

namespace opt8bit {
namespace {

// What both look up of a line: the sum of codebook.h, in fixed point, and its `cap` in the same.
template <class Simd, class Table, bool kSigned>
class LineTables {
 public:
  using Floats = typename Simd::Floats;
  using Ints = typename Simd::Ints;

  // As integers these compare as the sums do.
  Ints capped(Ints place, Ints line) const { return Simd::min_unsigned(place, Simd::bits(Simd::lookup(cap_, line))); }

 protected:
  LineTables(Table slope, Table intercept, Table cap) : slope_(slope), intercept_(intercept), cap_(cap) {}

  Ints fixed_point_sum(Floats x, Ints line) const {
    const Ints sum = Simd::bits(Simd::fma(x, Simd::lookup(slope_, line), Simd::lookup(intercept_, line)));
    return kSigned ? sum : Simd::add(sum, sum);
  }

 private:
  Table slope_, intercept_, cap_;
};

// All have: `shifted` values from magnitudes and the reciprocal of the largest; the `line` of each; its `place` there,
// a code and a fraction in fixed point; and the place `capped` to the line's codes. A place whose fraction is under
// kEncoderSlack may be one code off.

template <class Simd, bool kSigned>
class WideLines : public LineTables<Simd, typename Simd::Table16, kSigned> {
 public:
  using Tables = LineTables<Simd, typename Simd::Table16, kSigned>;
  using typename Tables::Floats;
  using typename Tables::Ints;

  explicit WideLines(const DynamicMap& map)
      : Tables(Simd::table16(map.encoder.slope), Simd::table16(map.encoder.intercept), Simd::table16(map.encoder.cap)),
        line_end_(Simd::table32(map.encoder.line_end)) {}

  static Floats shifted(Floats value, Floats reciprocal) {
    return Simd::fma(value, reciprocal, Simd::broadcast(kEncoderShift));
  }
  Ints line(Floats x) const {
    const Floats line_end = Simd::lookup(line_end_, Simd::exponent(x));
    return Simd::add_where(Simd::greater_or_nan(x, line_end), Simd::bits(line_end), Simd::broadcast(-1));
  }
  Ints place(Floats x, Ints line) const { return this->fixed_point_sum(x, line); }

 private:
  typename Simd::Table32 line_end_;
};

template <class Simd, bool kSigned>
class NarrowLines : public LineTables<Simd, typename Simd::Table8, kSigned> {
 public:
  using Tables = LineTables<Simd, typename Simd::Table8, kSigned>;
  using typename Tables::Floats;
  using typename Tables::Ints;

  explicit NarrowLines(const DynamicMap& map)
      : Tables(Simd::table8(map.narrow_encoder.slope), Simd::table8(map.narrow_encoder.intercept),
               Simd::table8(map.narrow_encoder.cap)),
        line_end_(Simd::table8(map.narrow_encoder.line_end)),
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
    const Ints sum = this->fixed_point_sum(x, line);
    return Simd::add_where(Simd::greater(x, one_begin_), sum, Simd::broadcast(kQuarter));
  }

 private:
  typename Simd::Table8 line_end_;
  Floats one_begin_;
};

// Here a `line` is what added to the bits of x gives its place.
template <class Simd, bool kSigned>
class TableLines {
 public:
  using Floats = typename Simd::Floats;
  using Ints = typename Simd::Ints;

  explicit TableLines(const DynamicMap& map) : places_(map.table_encoder.places) {}

  static Floats shifted(Floats value, Floats reciprocal) {
    const Floats shift = Simd::broadcast(kTableEncoderShift);
    return Simd::max_of_results(Simd::fma(value, reciprocal, shift), shift);  // a NaN is taken for zero
  }
  Ints line(Floats x) const { return Simd::lookup(places_, x); }
  static Ints place(Floats x, Ints line) { return Simd::add(Simd::bits(x), line); }
  static Ints capped(Ints place, Ints) { return place; }

 private:
  const uint32_t* places_;
};

}  // namespace
}  // namespace opt8bit
