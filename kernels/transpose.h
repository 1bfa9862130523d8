// Matrices of elements of 16 or 32 bits, transposed by tiles that fit into registers.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace opt8bit {
namespace {

// Rows of a tile: as many elements as a vector of 16 bytes has, which all processors have instructions for.
template <class T>
constexpr int kTile = 16 / sizeof(T);

template <class T>
struct TileRow {
  using Word = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  typedef Word Words __attribute__((vector_size(16)));
  Words words;
};

// The first, or the last, halves of both rows, their words taken in turn.
template <bool kLast, class T, size_t... i>
OPT8BIT_INLINE TileRow<T> interleaved(TileRow<T> a, TileRow<T> b, std::index_sequence<i...>) {
  constexpr int n = kTile<T>, kFirst = kLast ? n / 2 : 0;
#if defined(__clang__)
  return {__builtin_shufflevector(a.words, b.words, (kFirst + int(i) / 2 + int(i) % 2 * n)...)};
#else
  using Row = TileRow<T>;
  return {__builtin_shuffle(a.words, b.words, typename Row::Words{typename Row::Word(kFirst + i / 2 + i % 2 * n)...})};
#endif
}

// Rows i and i + n / 2 of n, interleaved, become rows 2 i and 2 i + 1. Done log2(n) times, this transposes.
template <class T>
OPT8BIT_INLINE void transpose_tile(const T* source, int64_t columns, T* target, int64_t rows) {
  constexpr int n = kTile<T>;
  constexpr auto kAll = std::make_index_sequence<n>();
  TileRow<T> x[n], y[n];
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) std::memcpy(&x[i], source + i * columns, sizeof x[i]);
#pragma GCC unroll 3
  for (int done = 1; done < n; done *= 2) {
#pragma GCC unroll 4
    for (int i = 0; i < n / 2; ++i) {
      y[2 * i] = interleaved<false>(x[i], x[i + n / 2], kAll);
      y[2 * i + 1] = interleaved<true>(x[i], x[i + n / 2], kAll);
    }
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) x[i] = y[i];
  }
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) std::memcpy(target + i * rows, &x[i], sizeof x[i]);
}

// `source` is (rows, columns), `target` (columns, rows).
template <class T>
OPT8BIT_NOINLINE void transpose(const T* source, int64_t rows, int64_t columns, T* target) {
  constexpr int64_t n = kTile<T>;
  const int64_t whole_rows = rows / n * n, whole_columns = columns / n * n;
  for (int64_t j = 0; j < whole_columns; j += n) {
    for (int64_t i = 0; i < whole_rows; i += n)
      transpose_tile(source + i * columns + j, columns, target + j * rows + i, rows);
    for (int64_t i = whole_rows; i < rows; ++i)
      for (int64_t k = j; k < j + n; ++k) target[k * rows + i] = source[i * columns + k];
  }
  for (int64_t j = whole_columns; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) target[j * rows + i] = source[i * columns + j];
}

}  // namespace
}  // namespace opt8bit
