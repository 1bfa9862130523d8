// One functor per optimizer, one file per family: a step of one vector of elements in float32, in the order of its
// paper. A rule knows neither how its states are stored nor the number of lanes. Included after one of simd/*.h.
//
// A functor has the name of a Python rule, whose hyper-parameters it declares in `Rule.hyper`'s order. One that has
// norms names two quantities in `measure`, and is then made with the norms of both over the whole tensor.
#pragma once

#include "rules/adagrad.h"
#include "rules/adam.h"
#include "rules/ademamix.h"
#include "rules/lamb.h"
#include "rules/lars.h"
#include "rules/lion.h"
#include "rules/rmsprop.h"
#include "rules/sgd.h"

namespace opt8bit {
namespace {

template <class... Rules>
struct List {};

// Every rule. Its place is its number.
using UpdateRules =
    List<Adam, AdamAmsgrad, AdamW, AdamWAmsgrad, Sgd, SgdMomentum, RmsProp<false, false>, RmsProp<false, true>,
         RmsProp<true, false>, RmsProp<true, true>, Adagrad, Lion, AdEMAMix, Lamb, Lars, LarsMomentum, AdamCautious,
         AdamAmsgradCautious, AdamWCautious, AdamWAmsgradCautious, LionCautious, SgdMomentumCautious>;

}  // namespace
}  // namespace opt8bit
