// Which values a code can take: a sorted codebook, its exact nearest-value search, and, for the dynamic map
// of "8-bit Optimizers via Block-wise Quantization", the tables of an arithmetic encoder.
#pragma once

#include <cstdint>

namespace opt8bit {

// The dynamic map, written as a line per decade. Count its codes from zero: c = |code - 127| in the signed map and
// c = code + 1 in the unsigned one. Then c in [2^j, 2^(j+1)) covers one decade [0.1, 1] * 10^(i-6) with equal cells,
// where i = j in the signed map and i = j - 1 in the unsigned one.
//
// Decoding: value = slope * c + intercept, rounded once. That is the map's definition in float32. Zero and one, which
// are no decades, are on a line of their own, the same for both.
struct DynamicDecoder {
  float slope[16], intercept[16];  // by the low 3 bits of the exponent of float(scale * c); there twice
  float scale;                     // 4 in the signed map, which keeps c = 0 apart from the exponents of decades
  float code_offset;               // signed c = code + code_offset
};

// Encoding: slope * x + intercept runs from 2^j to 2^(j+1) over the decade, plus a constant, so truncating gives c. The
// exponent of x names the line, except where a line ends inside a binade, at `line_end`. A line's last cell ends one
// step past 2^(j+1), where the next decade's wider cells begin: the sum is capped. A negative x is encoded as -x, and
// its code mirrored about that of zero. The tables are for x + kEncoderShift, which has 32 exponents only.
//
// The arithmetic is in float32, in one binade: the bits of the sum are a number in fixed point. Their low 16 are the
// fraction and the next 8 the code: kEncoderBase + c of the signed map has 16 bits of fraction, 2 kEncoderBase + code
// of the unsigned one has 15, so that those bits are added to themselves. The sum lands less than `kEncoderSlack` above
// the true sum and never below it, so a code is certain unless the fraction is under that; an exact search decides the
// rest.
struct DynamicEncoder {
  float line_end[32];  // by the low 5 bits of x's exponent: the x above which the next line holds, or the largest
                       // number. The low 4 bits name the line at the binade's lower end, as 7 - i.
  float slope[16];     // by 7 - i, with i = -1 for the line whose only code is zero's and i = 7 for that of one
  float intercept[16];
  float cap[16];  // what has the bits of the capped sum in fixed point. A NaN is taken to be above every line_end: it
                  // finds entry 15, where all is zero.
};
constexpr float kEncoderBase = 128;
constexpr int kFractionBits = 16;
constexpr int32_t kEncoderSlack = 12;  // in units of 2^-16
constexpr int32_t kSignedZeroCode = 127;
constexpr int32_t kUnsignedCodeOne = INT32_C(-0x78ff0000);  // the bits of 2 kEncoderBase + 1, added to themselves
constexpr float kEncoderShift = 0x1p-31f;

// The same by tables of 8 entries, where permutes of 8 lanes are what the processor has. An entry is a line's i & 7,
// with i = -1 for zero's. One has no line: it is on that of the decade below, whose cell in which one's begins has its
// last quarter left over. The least line of a binade comes of the exponent: times log10(2), it is i & 7, or one less
// where no line ends in the binade. A NaN is taken for zero.
struct NarrowEncoder {
  float line_end[8];  // the x above which the next line holds, or the largest number
  float slope[8], intercept[8], cap[8];
  float one_begin;  // x above it have kQuarter added to their sums
};
constexpr float kNarrowEncoderShift = 0x1p-23f;
constexpr int kLog10Of2 = 19728;  // in units of 2^-16
constexpr int32_t kQuarter = 1 << (kFractionBits - 2);

// The same without lines, where a read from memory costs less than the arithmetic of lines. The upper half of the bits
// of the shifted x names a cell in which at most one code ends. The cell's number added to the bits of x is in fixed
// point: the low 16 bits, which count from where the code ends, carry into the code. A NaN is taken for zero, which the
// shift puts in the middle of its cell, as zero is certain.
struct TableEncoder {
  uint32_t places[1 << 12];  // by bits 16 to 27 of x
};
constexpr float kTableEncoderShift = 0x1.01p-23f;

struct DynamicMap {
  bool is_signed;
  DynamicDecoder decoder;
  DynamicEncoder encoder;
  NarrowEncoder narrow_encoder;
  TableEncoder table_encoder;
  float state_values[256];  // by codes as states hold them
};

struct Codebook {
  float values[256];      // ascending; beyond `size`, the last value
  double midpoints[255];  // between neighbours: exact, as each has 25 bits
  int size;
  uint8_t zero_code;          // nearest to 0: what a NaN is coded as
  const DynamicMap* dynamic;  // null where `values` is not a dynamic map

  Codebook(const float* values, int size);

  // Whether x is nearer to a code above the midpoint of `code` and `code` + 1. The product is exact in double.
  bool is_above_midpoint(float x, float absmax, int code) const { return x > midpoints[code] * absmax; }
};

const Codebook& dynamic_map(bool is_signed);

// argmin over codes of |x - values[code] * absmax| in exact arithmetic; a tie goes to the lower code.
// +Inf is coded as the largest value, -Inf as the smallest, NaN (and anything where absmax is 0) as `zero_code`.
uint8_t nearest_code(float x, float absmax, const Codebook& codebook);

// States hold codes of a dynamic map counted from that of zero, modulo 256, so that byte 0 is the value 0. Their scale
// has the sign of the block's largest element: x is coded as x / scale is, so that -x has the code of x.
uint8_t nearest_state_code(float x, float scale, const Codebook& codebook);
// The same, searched from a code near it.
uint8_t nearest_state_code_from(uint8_t code, float x, float scale, const Codebook& codebook);

}  // namespace opt8bit
