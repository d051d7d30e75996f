/* Packets without a meeting: the low-latency exchanges of xla_ffi/device/packets.cuh,
 * ops/dispatch/low_latency_cuda.cuh and ops/combine/low_latency_cuda.cuh, among calls of all kinds.
 *
 * N ranks (2, 3) of NB blocks each make E calls in a row. Calls are of any of the first KINDS of
 * these kinds, and the same on all ranks:
 *   DISPATCH  called, choices, rows; each block waits for the choices of every peer, then for rows
 *   COMBINE   called, sums; each block waits for `called` of every peer, and for sums
 *   PUSH      called; block b of a rank swaps `pushed` with block b of each peer
 *   PART      a swap of addresses; the last block of a rank swaps read_done
 *   BLOCKS    a swap of addresses; block b of a rank swaps `pushed` with block b of each peer
 *
 * The first block of a rank sends `called`, the last one choices. Each block sends each peer one
 * packet of rows or sums, or none. Block b of a peer receives a sum of block b, and a row of block
 * NB - 1 - b. meeting.pml shows what other calls read and store.
 *
 * Switches (-D...):
 *   OTHER=n   the last rank makes another call as its n-th: of any kind, with another tag
 *   TIMEOUTS  a wait whose signal is not there may give up at any time
 *   ONE_GIVES_UP  only rank 0 does: fewer states
 *   WIRE      what a rank stores arrives later, in any order, as in meeting.pml
 *   AT_ONCE   what a block stores at all its peers arrives at once: fewer states
 * Each of these takes a part of the protocol away (sanity: must be found):
 *   NO_CALLED  a combine does not wait for `called`
 *   ONE_HALF  rooms, and signals that have two halves, have one
 *   NO_TAG    nobody looks at the tag of a call
 *   BESIDE    a call begins when the one before has counted out (EndEpoch), beside blocks that
 *             still receive
 *
 * A cell holds the epoch that was stored last, or 0. The sender and its epoch name one call, so the
 * epoch stands for the tag and the data, too. Packets of a dispatch and of a combine share their
 * places: the first sum lies where choices lie.
 */
#ifndef N
#define N 2
#endif
#ifndef NB
#define NB 1
#endif
#ifndef E
#define E 3
#endif
#ifndef KINDS
#define KINDS 5
#endif
#ifndef OTHER
#define OTHER 0
#endif
#define DISPATCH 1
#define COMBINE 2
#define PUSH 3
#define PART 4
#define BLOCKS 5
#define MEETS(k) ((k) >= PART)
#ifdef ONE_HALF
#define HALF(e) 0
#else
#define HALF(e) ((e) & 1)
#endif

/* Cells: [place, holder, source] */
#define AT(place, h, s) (((place) * N + (h)) * N + (s))
#ifdef WIRE
#define ABORT(h, s) AT(0, h, s)
#else
#define ABORT(h, s) AT(0, h, 0)
#endif
#define ADDRESS(h, s) AT(1, h, s)
#define READ_DONE(h, s) AT(2, h, s)
#define IN_HALF(e, i, h, s) AT(3 + HALF(e) * (2 * NB + 2) + (i), h, s)
#define CALLED(e, h, s) IN_HALF(e, 0, h, s)
#define PACKET(e, h, s, i) IN_HALF(e, 1 + (i), h, s) /* choices and NB rows, or NB sums */
#define PUSHED(e, h, s, b) IN_HALF(e, 2 + NB + (b), h, s)
#define CELLS 144
byte cell[CELLS];
#define IS_ABORTED(r) (cell[ABORT(r, 0)] || cell[ABORT(r, 1)] || cell[ABORT(r, N - 1)])

/* Kinds of the calls. The call of OTHER is the first. */
byte kind[E + 1];
#define CALL(r) ((e == OTHER && (r) == N - 1) -> 0 : e)
#define DIFFERS(p) (e == OTHER && ((r == N - 1) != ((p) == N - 1)))
/* Whether a packet is sent: 0 not chosen, 1 no, 2 yes; 3 more when one side has asked. */
byte goes[(E + 1) * N * N * NB];
#define GOES(h, s, i) ((((e) * N + (h)) * N + (s)) * NB + (i))

byte kernel[N];   /* the call that runs */
byte num_out[N];  /* blocks that have ended it */
byte num_done[N]; /* num_blocks_done */
bit has_failed[N];
byte num_over; /* blocks that make no more calls */
#define ANY_FAILED (has_failed[0] || has_failed[1] || has_failed[N - 1])

#ifdef WIRE
byte way[CELLS];    /* posted */
byte num_posted[N]; /* by source */
/* Delivers what is on its way. */
#define W(i) :: d_step { (way[i] != 0) -> cell[i] = way[i]; way[i] = 0; num_posted[(i) % N]-- }
#define FOUR(i) W(i) W((i) + 1) W((i) + 2) W((i) + 3)
#define TWELVE(i) FOUR(i) FOUR((i) + 4) FOUR((i) + 8)
#define ALL(i) TWELVE(i) TWELVE((i) + 12) TWELVE((i) + 24) TWELVE((i) + 36)
active proctype Wire() {
end:
  do
  ALL(0)
#if N == 3 || NB == 2
  ALL(48)
#endif
#if N == 3
  ALL(96)
#endif
  od
}
#define STORE(c, value) way[c] = value; num_posted[r]++
#define FENCE (num_posted[r] == 0)
#define TOGETHER atomic
#else
#define STORE(c, value) cell[c] = value
#define FENCE true
#ifdef AT_ONCE
#define TOGETHER atomic
#else
#define TOGETHER
#endif
#endif

/* To every peer. A rank counts its peers from itself on. */
#define PEER ((r + p) % N)
#define TELL_PEERS(c) \
  TOGETHER { \
    p = 1; \
    do \
    :: p < N -> d_step { STORE(c, e); p++ } \
    :: else -> break \
    od \
  }

/* Fail(): the first block of a rank that fails ends every wait of all ranks. */
inline Fail() {
  if
  :: d_step { !has_failed[r] -> has_failed[r] = 1 }
     FENCE;
     p = 0;
     do
     :: p < N -> d_step { STORE(ABORT(p, r), 1); p++ }
     :: else -> break
     od;
     FENCE
  :: else -> IS_ABORTED(r) /* another block of this rank tells */
  fi
}

#ifdef ONE_GIVES_UP
#define GIVES_UP (r == 0)
#else
#define GIVES_UP true
#endif

/* WaitUntil(): what is there counts, whatever else is known. */
#ifdef TIMEOUTS
#define WAIT(there) \
  if \
  :: (there) \
  :: (!(there) && IS_ABORTED(r)) -> ok = 0 \
  :: (!(there) && !IS_ABORTED(r) && GIVES_UP) -> Fail(); ok = 0 \
  fi
#else
#define WAIT(there) if :: (there) :: (!(there) && IS_ABORTED(r)) -> ok = 0 fi
#endif

/* IsCall(): the first block fails a call that differs, the other blocks wait for it. */
inline CheckCall() {
#ifndef NO_TAG
  if
  :: ok && DIFFERS(PEER) && b == 0 -> Fail(); ok = 0
  :: ok && DIFFERS(PEER) && b != 0 -> WAIT(false)
  :: else
  fi
#else
  skip
#endif
}
#define AWAIT_PEERS(there) \
  p = 1; \
  do \
  :: p < N && ok -> WAIT(there); CheckCall(); TAKE; p++ \
  :: else -> break \
  od

#define HAS_CALLED (cell[CALLED(e, r, PEER)] == e)
#ifndef NO_TAG
#define IS_THERE(i) (HAS_CALLED && (cell[PACKET(e, r, PEER, i)] == e || DIFFERS(PEER)))
#else
#define IS_THERE(i) (HAS_CALLED && cell[PACKET(e, r, PEER, i)] == e)
#endif
/* A peer that sends packets tells no address, but the tag of its call. */
#ifndef NO_TAG
#define HAS_MET (cell[ADDRESS(r, PEER)] == e || (HAS_CALLED && DIFFERS(PEER)))
#else
#define HAS_MET (cell[ADDRESS(r, PEER)] == e)
#endif
/* A packet that a block takes is one of its own call. */
#define TAKE assert(!ok || !DIFFERS(PEER))

/* Whether block i of the source sends a packet. Sides that make the same call get one answer. */
inline Choose(h, s, i) {
  if
  :: DIFFERS(PEER) -> if :: goes_there = 0 :: goes_there = 1 fi
  :: else ->
     if
     :: goes[GOES(h, s, i)] == 0 -> if :: goes[GOES(h, s, i)] = 1 :: goes[GOES(h, s, i)] = 2 fi
     :: else
     fi;
     goes_there = (goes[GOES(h, s, i)] % 3 == 2);
     goes[GOES(h, s, i)] = (goes[GOES(h, s, i)] < 3 -> goes[GOES(h, s, i)] + 3 : 0)
  fi
}
/* Sends rows or sums. */
inline SendSome(place) {
  TOGETHER {
    p = 1;
    do
    :: p < N ->
       atomic {
         Choose(PEER, r, b);
         if :: goes_there -> STORE(PACKET(e, PEER, r, place), e) :: else fi;
         goes_there = 0;
         p++
       }
    :: else -> break
    od
  }
}
/* Receives the rows or sums of block i of each peer. */
inline ReceiveSome(i, place) {
  p = 1;
  do
  :: p < N && ok ->
     atomic { Choose(r, PEER, i) };
     if
     :: goes_there -> WAIT(IS_THERE(place)); CheckCall(); TAKE
     :: else
     fi;
     atomic { goes_there = 0; p++ }
  :: else -> break
  od
}

/* The kernel's end: all blocks are through, all stores have arrived. */
inline CountOut() {
  d_step { num_out[r]++; is_last = (num_out[r] == NB) }
  if
  :: is_last ->
     FENCE;
     d_step {
       is_last = 0;
       num_out[r] = 0;
       kernel[r] = e + 1;
#ifndef BESIDE
       assert(e != OTHER); /* a call that differs fails on every rank */
       /* Cells of a call that all have ended count as empty: fewer states. */
       if
       :: kernel[0] > e && kernel[1] > e && kernel[N - 1] > e ->
          kind[e] = 0;
          p = ADDRESS(0, 0);
          do
          :: p < CELLS -> if :: cell[p] == e -> cell[p] = 0 :: else fi; p++
          :: else -> break
          od;
          p = 0
       :: else
       fi
#endif
     }
  :: else
  fi
}

proctype Block(byte r; byte b) {
  byte e = 1, k, p;
  bit ok, goes_there, is_last;
  do
  :: e > E -> break
  :: else ->
    atomic {
      kernel[r] == e || IS_ABORTED(r);
      if :: IS_ABORTED(r) -> goto stop :: else fi; /* no call does anything any more */
      if
      :: kind[CALL(r)] == 0 ->
         if
         :: KINDS >= BLOCKS -> kind[CALL(r)] = BLOCKS
         :: KINDS >= PART -> kind[CALL(r)] = PART
         :: KINDS >= PUSH -> kind[CALL(r)] = PUSH
         :: KINDS >= COMBINE -> kind[CALL(r)] = COMBINE
         :: kind[CALL(r)] = DISPATCH
         fi
      :: else
      fi;
      k = kind[CALL(r)];
      ok = 1
    }

    /* Begin, or OpenCall; packets. */
    if
    :: ok && b == 0 && !MEETS(k) -> TELL_PEERS(CALLED(e, PEER, r))
    :: ok && b == 0 && MEETS(k) ->
       FENCE;
       TELL_PEERS(ADDRESS(PEER, r))
    :: else
    fi;
    if
    :: ok && MEETS(k) ->
       AWAIT_PEERS(HAS_MET);
       /* Reading in place: no owner has ended the call. */
       assert(!ok || ANY_FAILED || (kernel[0] <= e && kernel[1] <= e && kernel[N - 1] <= e))
    :: ok && k == DISPATCH ->
       if :: b == NB - 1 -> TELL_PEERS(PACKET(e, PEER, r, 0)) :: else fi;
       SendSome(1 + b)
    :: ok && k == COMBINE -> SendSome(b)
    :: else
    fi;
#ifdef BESIDE
    CountOut();
#endif

    if
    :: ok && k == DISPATCH ->
       AWAIT_PEERS(IS_THERE(0));
       ReceiveSome(NB - 1 - b, 1 + NB - 1 - b)
    :: ok && k == COMBINE ->
#ifndef NO_CALLED
       AWAIT_PEERS(HAS_CALLED);
#endif
       ReceiveSome(b, b)
    :: ok && (k == PUSH || k == BLOCKS) ->
       FENCE;
       TELL_PEERS(PUSHED(e, PEER, r, b));
       AWAIT_PEERS(cell[PUSHED(e, r, PEER, b)] == e)
    :: k == PART ->
       d_step {
         num_done[r]++;
         is_last = (num_done[r] == NB);
         if :: is_last -> num_done[r] = 0 :: else fi
       }
       if
       :: is_last && ok ->
          FENCE;
          TELL_PEERS(READ_DONE(PEER, r));
          AWAIT_PEERS(cell[READ_DONE(r, PEER)] == e)
       :: else
       fi
    :: else
    fi;

    if :: !ok -> goto stop :: else fi;
    d_step {
      /* A dispatch reads choices again until it ends, and does not look at their epoch. */
      p = 1;
      do
      :: p < N && k == DISPATCH -> assert(cell[PACKET(e, r, PEER, 0)] == e); p++
      :: else -> break
      od;
      p = 0; k = 0
    }
#ifndef BESIDE
    CountOut();
#endif
    e++
  od;
stop:
  skip;
  d_step {
    assert(e > E || IS_ABORTED(r));
    e = 0; k = 0; p = 0; ok = 0; goes_there = 0; is_last = 0; num_over++
  }
}

init {
  byte i;
  atomic {
    do
    :: i < N -> kernel[i] = 1; i++
    :: else -> break
    od;
    i = 0;
    do
    :: i < N * NB -> run Block(i / NB, i % NB); i++
    :: else -> break
    od
  }
  num_over == N * NB;
  /* What one rank has found, all know. */
  assert(!ANY_FAILED || (IS_ABORTED(0) && IS_ABORTED(1) && IS_ABORTED(N - 1)))
}
