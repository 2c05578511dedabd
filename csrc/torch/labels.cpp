#include "labels.h"

#include <c10/util/Exception.h>

#include <atomic>

namespace aep {

namespace {

std::atomic<bool> asked_for{false};

}  // namespace

bool labels_asked() { return asked_for.load(std::memory_order_relaxed); }

void ask_labels(bool asked) { asked_for.store(asked, std::memory_order_relaxed); }

void refuse_label(const char* op, int64_t label, int64_t position, int64_t classes, bool may_ignore) {
  C10_THROW_ERROR(IndexError, c10::str("aep::", op, ": target must be within 0..", classes - 1,
                                       may_ignore ? " or ignore_index, got " : ", got ", label, " at position ",
                                       position));
}

}  // namespace aep
