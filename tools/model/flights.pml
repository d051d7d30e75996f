/* Flights: exchanges whose sending and receiving are kernels of their own (xla_ffi/core/flights.h,
 * device/flights.cuh).
 *
 * N ranks (2, 3) run the same S steps, each at its own pace. A step sends a flight in the first free
 * slot, or receives the flight of a slot, in any order that leaves at most two flights under way. A
 * send stores one word at every peer: `called` and packets in one, since a receive waits for both. A
 * receive waits for the word of every peer, then reads each of them once more.
 *
 * Switches (-D...):
 *   WIRE      what a rank stores arrives later, in any order
 * Each of these takes a part of the protocol away (sanity: must be found):
 *   ONE_PART  a slot has one part
 *   NO_SLOTS  flights count in one sequence over four parts, and are received in any order
 *   THREE     a third flight is sent while two are under way, in the slot of the first
 *
 * A cell holds the number of the flight that was stored last, or 0.
 */
#ifndef N
#define N 2
#endif
#ifndef S
#define S 6
#endif
#define SLOTS 2
#define SEND SLOTS

#ifdef NO_SLOTS
#define NEXT(r, slot) (last[r] + 1)
#define PART(n) ((n) & 3)
#else
#define NEXT(r, slot) (sent[(r) * SLOTS + (slot)] -> sent[(r) * SLOTS + (slot)] + 2 : 2 + (slot))
#ifdef ONE_PART
#define PART(n) ((n) & 1)
#else
#define PART(n) ((n) & 3)
#endif
#endif

#define AT(part, h, s) (((part) * N + (h)) * N + (s))
#define CELLS (4 * N * N)
byte cell[CELLS];

byte step[S];        /* a slot to receive, or SEND; the same on all ranks */
byte sent[N * SLOTS];     /* by rank and slot: the last flight */
byte received[N * SLOTS]; /* by rank and slot */
byte last[N];             /* NO_SLOTS: the last flight of a rank */

#ifdef WIRE
byte way[CELLS];
#define W(i) :: d_step { (way[i] != 0) -> cell[i] = way[i]; way[i] = 0 }
#define FOUR(i) W(i) W((i) + 1) W((i) + 2) W((i) + 3)
#define SIXTEEN(i) FOUR(i) FOUR((i) + 4) FOUR((i) + 8) FOUR((i) + 12)
active proctype Wire() {
end:
  do
  SIXTEEN(0)
#if N == 3
  SIXTEEN(16)
  FOUR(32)
#endif
  od
}
/* A word on its way must have come before the next one is stored in the same place. */
#define STORE(c, value) assert(way[c] == 0); way[c] = value
#else
#define STORE(c, value) cell[c] = value
#endif

proctype Rank(byte r) {
  byte i, slot, n, p;
  i = 0;
  do
  :: i < S && step[i] == SEND ->
    atomic {
      slot = (sent[r * SLOTS] == received[r * SLOTS] -> 0 : 1);
#ifdef THREE
      if :: sent[r * SLOTS + 1] != received[r * SLOTS + 1] -> slot = 0 :: else fi;
#else
      assert(sent[r * SLOTS + slot] == received[r * SLOTS + slot]);
#endif
      n = NEXT(r, slot);
      last[r] = n;
      p = 0
    }
    do
    :: p < N && p != r -> atomic { STORE(AT(PART(n), p, r), n); p++ }
    :: p == r -> p++
    :: p == N -> break
    od;
    atomic { sent[r * SLOTS + slot] = n; i++ }
  :: i < S && step[i] < SEND ->
    atomic { slot = step[i]; n = sent[r * SLOTS + slot]; p = 0 }
    do
    :: p < N && p != r -> atomic { cell[AT(PART(n), r, p)] == n -> p++ }
    :: p == r -> p++
    :: p == N -> break
    od;
    p = 0;
    do
    :: p < N && p != r -> atomic { assert(cell[AT(PART(n), r, p)] == n); p++ }
    :: p == r -> p++
    :: p == N -> break
    od;
    atomic { received[r * SLOTS + slot] = n; i++ }
  :: i == S -> break
  od
}

init {
  byte i;
  bit open_0, open_1;
  /* Any order of sends and receives. A send takes slot 0 if it is free. */
  do
  :: i < S && !open_0 -> atomic { step[i] = SEND; open_0 = 1; i++ }
  :: i < S && open_0 && !open_1 -> atomic { step[i] = SEND; open_1 = 1; i++ }
#ifdef THREE
  :: i < S && open_0 && open_1 -> atomic { step[i] = SEND; i++ }
#endif
  :: i < S && open_0 -> atomic { step[i] = 0; open_0 = 0; i++ }
  :: i < S && open_1 -> atomic { step[i] = 1; open_1 = 0; i++ }
  :: i == S -> break
  od;
  atomic {
    run Rank(0);
    run Rank(1);
#if N == 3
    run Rank(2)
#endif
  }
}
