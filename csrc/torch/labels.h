// Labels out of range: the error, and whether it is asked for where looking at labels means waiting for a device.
#pragma once

#include <stdint.h>

namespace aep {

// As aep_ext.ops.check_labels was called last, for the whole process; the CPU looks at labels in any case.
bool labels_asked();
void ask_labels(bool asked);

// Raises IndexError: `label`, at `position`, is neither a class nor, where `may_ignore`, the label to be ignored.
[[noreturn]] void refuse_label(const char* op, int64_t label, int64_t position, int64_t classes, bool may_ignore);

}  // namespace aep
