// One functor per optimizer, one file per family: a step of one vector of elements in float32, in the order of its
// paper. A rule knows neither how its states are stored nor the number of lanes. Included after one of simd/*.h.
//
// Hyper-parameters come as doubles, in the order of `Rule.hyper` of the Python rule of the same name. A rule that has
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
