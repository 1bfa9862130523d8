#include "codebook.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "half.h"

namespace opt8bit {
namespace {

constexpr int kDecades = 7;

// i = -1 stands for zero, i = 7 for one.
DynamicDecoder make_decoder(bool is_signed) {
  DynamicDecoder decoder = {};
  decoder.scale = is_signed ? 4 : 1;
  decoder.code_offset = is_signed ? -127 : 1;
  for (int i = 0; i < kDecades; ++i) {
    const int cells = is_signed ? 1 << i : 2 << i;
    const int index = (127 + std::ilogb(decoder.scale * cells)) & 7;
    // The middle of cell c - cells: 10^(i-6) * (0.1 + 0.9 * (c - cells + 1/2) / cells), as quotients of whole numbers.
    double denominator = cells;
    for (int k = i; k < 6; ++k) denominator *= 10;
    decoder.slope[index] = static_cast<float>(9 / (10 * denominator));
    decoder.intercept[index] = static_cast<float>((9 - 16 * cells) / (20 * denominator));
  }
  const int first = is_signed ? 0 : 1, last = is_signed ? 128 : 256, index = is_signed ? 0 : 7;
  decoder.slope[index] = 1.0f / static_cast<float>(last - first);
  decoder.intercept[index] = -decoder.slope[index] * static_cast<float>(first);
  for (int i = 0; i < 8; ++i) {
    decoder.slope[8 + i] = decoder.slope[i];
    decoder.intercept[8 + i] = decoder.intercept[i];
  }
  return decoder;
}

float decode(const DynamicDecoder& decoder, int code) {
  const double c = code + decoder.code_offset, scaled = decoder.scale * c;
  const int index = scaled == 0 ? 0 : (127 + std::ilogb(scaled)) & 7;
  // In double both operations are exact, so that this rounds once.
  return static_cast<float>(decoder.slope[index] * c + std::copysign(1.0, c) * decoder.intercept[index]);
}

// x with its low 4 bits replaced; if it is to be rounded up, the least such number from x + 4 ulp on.
float with_low_bits(float x, uint32_t low_bits, bool round_up) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = ((round_up ? bits + 4 + 15 - low_bits : bits) & ~15u) | low_bits;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// What has the bits of a sum in fixed point, by the arithmetic of codebook.h.
float fixed_point(double sum, bool is_signed) {
  float x = static_cast<float>(sum);
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (!is_signed) bits += bits;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// What the encoder's tables are made of.
struct EncoderLine {
  double slope, intercept, cap;  // in float(slope) * x + intercept
  double end;                    // its largest x; one's has none
};

// Line i = -1 is zero's, i = 7 that of one.
EncoderLine encoder_line(const Codebook& codebook, bool is_signed, int i) {
  constexpr double kIntercept = 8.0 / 9;
  constexpr double kErrors = 0x1p-14;  // bound of the rounding errors that could land below the true sum
  const int zero_code = is_signed ? kSignedZeroCode : 0;
  const int j_of_first_line = is_signed ? -1 : 0;
  const double base = is_signed ? kEncoderBase : 2 * kEncoderBase - 1;  // code = c - 1 in the unsigned map

  const auto j_of = [&](int line) { return line + 1 + j_of_first_line; };
  const auto end_of = [&](int line) {
    return codebook.midpoints[line < 0 ? zero_code : (is_signed ? 127 : -1) + (2 << j_of(line)) - 1];
  };
  const double scale = std::ldexp(1.0, j_of(i));
  EncoderLine line = {};
  line.cap = base + 2 * scale - 0.5;
  line.intercept = base + kIntercept * scale;
  if (i < kDecades) line.end = end_of(i);
  if (i < 0) {
    // One code, zero's: the line begins at its cap, and is tilted so that it, too, crosses a whole number at its end.
    line.intercept = line.cap;
    line.slope = 1.5 / line.end;
  } else if (i < kDecades) {
    line.slope = std::pow(10.0, 6 - i) / 0.9 * scale;
  } else {
    line.slope = (1 - kIntercept) * scale / end_of(kDecades - 1);  // crosses 2^j where the line below ends
  }
  line.slope = static_cast<float>(line.slope);
  line.intercept += kErrors;
  return line;
}

template <class Encoder>
void set_line(Encoder& encoder, int entry, const EncoderLine& line, double cap, float shift, bool is_signed) {
  encoder.slope[entry] = static_cast<float>(line.slope);
  encoder.intercept[entry] = static_cast<float>(line.intercept - line.slope * double{shift});
  encoder.cap[entry] = fixed_point(cap, is_signed);
}

DynamicEncoder make_encoder(const Codebook& codebook, bool is_signed) {
  DynamicEncoder encoder = {};
  double line_end[kDecades + 2];
  for (int i = -1; i <= kDecades; ++i) {
    const EncoderLine line = encoder_line(codebook, is_signed, i);
    set_line(encoder, 7 - i, line, line.cap, kEncoderShift, is_signed);
    line_end[i + 1] = line.end;
  }
  line_end[kDecades] = codebook.values[254];  // one's line begins inside the last cell of the line below
  int i = -1;
  for (int binade = 0; binade < 32; ++binade) {
    const double shifted_end = i < kDecades ? line_end[i + 1] + kEncoderShift : 0;
    const bool ends_here = i < kDecades && shifted_end < std::ldexp(1.0, binade - 30);
    const float end = ends_here ? static_cast<float>(shifted_end) : std::numeric_limits<float>::max();
    encoder.line_end[binade] = with_low_bits(end, 7 - i, ends_here);
    if (ends_here) ++i;
  }
  return encoder;
}

NarrowEncoder make_narrow_encoder(const Codebook& codebook, bool is_signed) {
  constexpr double kErrors = 2 * 0x1p-23;  // bound of what a shifted x may be off by, relatively
  NarrowEncoder encoder = {};
  for (int i = -1; i < kDecades; ++i) {
    const EncoderLine line = encoder_line(codebook, is_signed, i);
    const bool is_last = i == kDecades - 1;
    const int entry = i & 7;
    set_line(encoder, entry, line, is_last ? line.cap + 1 : line.cap, kNarrowEncoderShift, is_signed);
    const double shifted_end = line.end + kNarrowEncoderShift;
    encoder.line_end[entry] =
        is_last ? std::numeric_limits<float>::max() : static_cast<float>(shifted_end * (1 + kErrors));
    if (is_last) encoder.one_begin = static_cast<float>(shifted_end * (1 - kErrors));
  }
  return encoder;
}

TableEncoder make_table_encoder(const Codebook& codebook, bool is_signed) {
  constexpr double kErrors = 2 * 0x1p-23;  // as above
  constexpr uint32_t kCell = 1 << kFractionBits;
  constexpr uint32_t kUnsignedBase = static_cast<uint32_t>(kUnsignedCodeOne) - kCell;
  const int zero_code = is_signed ? kSignedZeroCode : 0, last = is_signed ? 128 : 255;
  const auto end_of = [&](int code) {
    const double end = codebook.midpoints[zero_code + code] + kTableEncoderShift;
    return bits_from_float(static_cast<float>(end * (1 - kErrors)));
  };
  TableEncoder encoder = {};
  int code = 0;
  for (uint32_t cell = bits_from_float(0x1p-23f); cell <= bits_from_float(1.0f); cell += kCell) {
    while (code < last && end_of(code) <= cell) ++code;
    uint32_t place = (is_signed ? 0 : kUnsignedBase) + static_cast<uint32_t>(code) * kCell;
    if (code < last && end_of(code) < cell + kCell) place += cell + kCell - end_of(code);
    encoder.places[cell / kCell % (1 << 12)] = place - cell;
  }
  return encoder;
}

struct DynamicMaps {
  DynamicMap maps[2];
  Codebook codebooks[2];

  static Codebook make(const DynamicDecoder& decoder) {
    float values[256];
    for (int code = 0; code < 256; ++code) values[code] = decode(decoder, code);
    return Codebook(values, 256);
  }
  DynamicMaps()
      : maps{{false, make_decoder(false), {}, {}, {}, {}}, {true, make_decoder(true), {}, {}, {}, {}}},
        codebooks{make(maps[0].decoder), make(maps[1].decoder)} {
    for (int is_signed = 0; is_signed < 2; ++is_signed) {
      maps[is_signed].encoder = make_encoder(codebooks[is_signed], is_signed != 0);
      maps[is_signed].narrow_encoder = make_narrow_encoder(codebooks[is_signed], is_signed != 0);
      maps[is_signed].table_encoder = make_table_encoder(codebooks[is_signed], is_signed != 0);
      for (int code = 0; code < 256; ++code)
        maps[is_signed].state_values[code] =
            codebooks[is_signed].values[(code + (is_signed ? kSignedZeroCode : 0)) % 256];
      codebooks[is_signed].dynamic = &maps[is_signed];
    }
  }
};

const DynamicMaps& dynamic_maps() {
  static const DynamicMaps maps;
  return maps;
}

}  // namespace

Codebook::Codebook(const float* source, int size) : size(size), zero_code(0), dynamic(nullptr) {
  for (int code = 0; code < 256; ++code) values[code] = source[code < size ? code : size - 1];
  for (int code = 0; code + 1 < size; ++code)
    midpoints[code] = (static_cast<double>(values[code]) + values[code + 1]) / 2;
  zero_code = nearest_code(0.0f, 1.0f, *this);
}

const Codebook& dynamic_map(bool is_signed) { return dynamic_maps().codebooks[is_signed]; }

uint8_t nearest_code(float x, float absmax, const Codebook& codebook) {
  if (x != x || absmax == 0) return codebook.zero_code;
  if (std::isinf(x)) return static_cast<uint8_t>(x > 0 ? codebook.size - 1 : 0);
  int low = 0, high = codebook.size - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (codebook.is_above_midpoint(x, absmax, middle)) low = middle + 1;
    else high = middle;
  }
  return static_cast<uint8_t>(low);
}

uint8_t nearest_state_code(float x, float scale, const Codebook& codebook) {
  const uint8_t code = nearest_code(std::copysign(1.0f, scale) * x, std::fabs(scale), codebook);
  return static_cast<uint8_t>(code - codebook.zero_code);
}

uint8_t nearest_state_code_from(uint8_t state_code, float x, float scale, const Codebook& codebook) {
  if (!std::isfinite(x)) return nearest_state_code(x, scale, codebook);
  const float mirrored = std::copysign(1.0f, scale) * x, magnitude = std::fabs(scale);
  int code = static_cast<uint8_t>(state_code + codebook.zero_code);
  while (code > 0 && !codebook.is_above_midpoint(mirrored, magnitude, code - 1)) --code;
  while (code < codebook.size - 1 && codebook.is_above_midpoint(mirrored, magnitude, code)) ++code;
  return static_cast<uint8_t>(code - codebook.zero_code);
}

}  // namespace opt8bit
