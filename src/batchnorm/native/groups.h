// A call on a batch that is cut into groups, each of which is normalized on its own.
#pragma once

#include "call.h"

namespace batchnorm {

// Run a call: all groups, one after the other or side by side.
void run(const Forward& call);
void run(const Backward& call);

}  // namespace batchnorm
