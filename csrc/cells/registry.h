// The registry: one row a cell. Every driver instantiates its kernels from this list.
#pragma once

#include "cells/elman.h"
#include "cells/gru.h"
#include "cells/lstm.h"

#define RNNKERN_CELLS(ROW) \
  ROW(ElmanTanh)           \
  ROW(ElmanRelu)           \
  ROW(Lstm)                \
  ROW(Gru)                 \
  ROW(GruResetBefore)
