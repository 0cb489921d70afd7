// What the fake libraries count, shared by all of them. Filled in by runtime.c.
#pragma once
typedef struct {
  long launches, syncs, event_syncs;
  long h2d, d2h, d2d, h2d_bytes, d2h_bytes, d2d_bytes;
  long allocations, frees, allocated_bytes, pinned;
} Counters;

Counters* fake_counters(void);
void fake_launch(const char* name);
// One line in the log, where one is open.
void fake_note(const char* line);
