/* The meet / read / part protocol of xla_ffi/device/call.cuh, packets.cuh and signals.cuh.
 *
 * N ranks (2, 3) of NB blocks each make E calls in a row. What each call is: KIND(e).
 *   PART    OpenCall, read every peer's operand in place, CloseCall: the last block of a rank swaps read_done.
 *   BLOCKS  OpenCall, read in place, CloseBlocks: block b of a rank swaps `pushed` with block b of each
 *           peer, CountOut, EndReading.
 *   PUSH    Begin, store a part in half e % 2 of each peer's room, PushedBarrier, EndEpoch, read the room.
 *
 * Switches (-D...):
 *   TIMEOUTS  a wait whose signal is not there may give up at any time (a peer that is slow, however slow)
 *   ONE_GIVES_UP  only rank 0 does: fewer states
 *   MET       the calls begin when all have met, and what a block tells arrives everywhere at once:
 *             fewer states, for what happens behind the meeting
 *   DIES      the last rank may be killed at any point marked MAY_DIE; implies TIMEOUTS
 *   NO_ACK    a call ends without waiting for read_done or pushed (sanity: must be found)
 *   NO_TOLD   nobody looks at told[] at the end of a call (sanity: must be found)
 *   ABORT_FIRST  Fail raises `abort` rank by rank together with told[] (sanity: must be found)
 *   ONE_HALF  rooms and their signals have one half instead of two (sanity: must be found)
 *
 * Memory. Signals are words of their holder. With -DWIRE a store to a peer is posted and arrives
 * later, in any order among the posted ones (a daemon delivers); a release, a system fence or a
 * kernel's end waits until what its rank has posted has arrived. Loads see what has arrived. So: no
 * store is seen out of release order, nothing else is ordered. Without it they arrive at once, one
 * after the other, in the order of the ranks. Told records always do: Write() has a fence before
 * is_set of the next.
 *
 * Reading in place is one moment, the last before the block counts: `has_ended` of an owner only
 * grows, so the last moment is the worst one.
 */
#ifdef DIES
#define TIMEOUTS
#endif
#ifndef N
#define N 2
#endif
#ifndef NB
#define NB 2
#endif
#ifndef E
#define E 2
#endif
#define PART 0
#define BLOCKS 1
#define PUSH 2
#ifndef K1
#define K1 PART
#endif
#ifndef K2
#define K2 K1
#endif
#ifndef K3
#define K3 K1
#endif
#define KIND(e) (((e) == 1) -> K1 : (((e) == 2) -> K2 : K3))
#ifdef ONE_HALF
#define HALF(e) 0
#else
#define HALF(e) ((e) & 1)
#endif

/* Cells: [holder, source] */
#define HS(h, s) ((h) * N + (s))
#define HSB(e, h, s, b) (((HALF(e) * N + (h)) * N + (s)) * NB + (b))
byte address[N * N];
byte read_done[N * N];
bit told[N * N];
bit abort_[N];
bit has_failed[N];
byte pushed[2 * N * N * NB];
byte room[2 * N * N * NB];
/* Posted, on their way. */
byte way_address[N * N];
byte way_done[N * N];
byte way_pushed[2 * N * N * NB];
byte way_room[2 * N * N * NB];
bit way_abort[N * N]; /* [holder, source] */
byte num_posted[N];   /* by source */

byte kernel[N];     /* the call that runs */
byte num_out[N];    /* blocks that have ended the kernel */
byte num_done[N];   /* num_blocks_done */
byte turn[N];       /* the epoch that has ended */
byte has_ended[N];  /* the last call whose kernel has ended: its operands may be anything now */
bit is_dead[N];
bit bad_read[N];        /* of the call that runs: some block has read behind an owner's end */
bit is_clean_result[N]; /* the last block has let its result stand */
bit any_failed = 0;
byte num_over = 0;  /* blocks that are through */

#define FENCE(r) (num_posted[r] == 0)

/* Delivers what is on its way. */
#define A(i) :: d_step { (way_address[i] != 0) -> address[i] = way_address[i]; way_address[i] = 0; num_posted[(i) % N]-- }
#define D(i) :: d_step { (way_done[i] != 0) -> read_done[i] = way_done[i]; way_done[i] = 0; num_posted[(i) % N]-- }
#define X(i) :: d_step { (way_abort[i]) -> abort_[(i) / N] = 1; way_abort[i] = 0; num_posted[(i) % N]-- }
#define P(i) :: d_step { (way_pushed[i] != 0) -> pushed[i] = way_pushed[i]; way_pushed[i] = 0; num_posted[((i) / NB) % N]-- }
#define R(i) :: d_step { (way_room[i] != 0) -> room[i] = way_room[i]; way_room[i] = 0; num_posted[((i) / NB) % N]-- }
#define FOUR(F, i) F(i) F((i) + 1) F((i) + 2) F((i) + 3)
#if N == 2
#define ALL(F) FOUR(F, 0)
#else
#define ALL(F) FOUR(F, 0) FOUR(F, 4) F(8)
#endif
#if N == 2 && NB == 1
#define ALL_BLOCKS(F) FOUR(F, 0) FOUR(F, 4)
#elif N == 2
#define ALL_BLOCKS(F) FOUR(F, 0) FOUR(F, 4) FOUR(F, 8) FOUR(F, 12)
#elif NB == 1
#define ALL_BLOCKS(F) FOUR(F, 0) FOUR(F, 4) FOUR(F, 8) FOUR(F, 12) F(16) F(17)
#else
#define ALL_BLOCKS(F) FOUR(F, 0) FOUR(F, 4) FOUR(F, 8) FOUR(F, 12) FOUR(F, 16) FOUR(F, 20) FOUR(F, 24) FOUR(F, 28) FOUR(F, 32)
#endif
#ifdef WIRE
active proctype Wire() {
end:
  do
#if K1 != PUSH || K2 != PUSH || K3 != PUSH
  ALL(A)
#endif
#if K1 == PART || K2 == PART || K3 == PART
  ALL(D)
#endif
#if K1 != PART || K2 != PART || K3 != PART
  ALL_BLOCKS(P)
#endif
#if K1 == PUSH || K2 == PUSH || K3 == PUSH
  ALL_BLOCKS(R)
#endif
#ifdef TIMEOUTS
  ALL(X)
#endif
  od
}
#endif

#ifdef DIES
#define MAY_DIE if :: r == N - 1 -> is_dead[r] = 1; goto stop :: skip fi; STOP_IF_DEAD
#else
#define MAY_DIE skip
#endif
#define STOP_IF_DEAD if :: is_dead[r] -> goto stop :: else fi
#define AWAIT(cond) if :: (cond) :: is_dead[r] -> goto stop fi

/* To every rank; to this block's like at every peer. */
#ifdef WIRE
#define POST_ALL(way, cell) \
  d_step { \
    h = 0; \
    do \
    :: h < N -> way[HS(h, r)] = e; num_posted[r]++; h++ \
    :: else -> break \
    od; h = 0 \
  }
#define POST_PEERS(way, cell) \
  d_step { \
    h = 0; \
    do \
    :: h < N -> if :: h != r -> way[HSB(e, h, r, b)] = e; num_posted[r]++ :: else fi; h++ \
    :: else -> break \
    od; h = 0 \
  }
#elif defined(MET)
#define POST_ALL(way, cell) \
  d_step { \
    h = 0; \
    do \
    :: h < N -> cell[HS(h, r)] = e; h++ \
    :: else -> break \
    od; h = 0 \
  }
#define POST_PEERS(way, cell) \
  d_step { \
    h = 0; \
    do \
    :: h < N -> if :: h != r -> cell[HSB(e, h, r, b)] = e :: else fi; h++ \
    :: else -> break \
    od; h = 0 \
  }
#else
#define POST_ALL(way, cell) \
  do \
  :: d_step { (h < N) -> cell[HS(h, r)] = e; h++ } \
  :: d_step { (h == N) -> h = 0 }; break \
  od; skip
#define POST_PEERS(way, cell) \
  do \
  :: d_step { (h < N && h != r) -> cell[HSB(e, h, r, b)] = e; h++ } \
  :: d_step { (h < N && h == r) -> h++ } \
  :: d_step { (h == N) -> h = 0 }; break \
  od; skip
#endif

#ifdef WIRE
#define RAISE(h) way_abort[HS(h, r)] = 1; num_posted[r]++
#else
#define RAISE(h) abort_[h] = 1
#endif

/* Fail(): the first of a rank tells every rank, then ends every wait. */
inline Fail() {
  any_failed = 1;
  if
  :: d_step { !has_failed[r] -> has_failed[r] = 1 }
     h = 0;
     do
     :: h < N -> AWAIT(FENCE(r)); MAY_DIE; told[HS(h, r)] = 1;
#ifdef ABORT_FIRST
        RAISE(h);
#endif
        h++
     :: else -> break
     od;
     MAY_DIE;
#ifndef ABORT_FIRST
     AWAIT(FENCE(r));
     h = 0;
     do
     :: d_step { (h < N) -> RAISE(h); h++ }
     :: else -> break
     od
#endif
  :: else -> AWAIT(abort_[r]) /* another thread of this rank tells */
  fi;
  h = 0
}

#ifdef ONE_GIVES_UP
#define GIVES_UP(r) ((r) == 0)
#else
#define GIVES_UP(r) true
#endif

/* WaitUntil(): what is there counts, whatever else is known. */
#ifdef TIMEOUTS
#define WAIT(there) \
  if \
  :: (there) \
  :: (!(there) && abort_[r]) -> ok = 0 \
  :: (!(there) && !abort_[r] && GIVES_UP(r)) -> Fail(); ok = 0 \
  :: is_dead[r] -> goto stop \
  fi
#else
#define WAIT(there) if :: (there) :: (!(there) && abort_[r]) -> ok = 0 fi
#endif

/* Reads peers' operands: is one's call over? */
inline Read() {
  d_step {
    h = 0;
    do
    :: h < N -> if :: has_ended[h] >= e -> is_dirty = 1 :: else fi; h++
    :: else -> break
    od; h = 0
  }
}

proctype Block(byte r; byte b) {
  byte e = 1;
  byte p, h;
  bit ok, has_met, is_dirty, is_last;
  bit sees[N]; /* what thread p of the block sees: a reason not to wait for peer p */
  do
  :: e > E -> break
  :: else ->
    AWAIT(kernel[r] == e);
    assert(turn[r] == e - 1); /* CurrentEpoch */
    d_step { ok = !abort_[r]; is_dirty = 0; is_last = 0; p = 0; h = 0 }
    MAY_DIE;

    if
#ifdef MET
    :: KIND(e) != PUSH -> has_met = 1; MAY_DIE; Read()
#else
    :: KIND(e) != PUSH -> /* OpenCall */
      if
      :: b == 0 && ok ->
        AWAIT(FENCE(r));
        POST_ALL(way_address, address);
      :: else
      fi;
      p = 0;
      do
      :: p < N && ok -> WAIT(address[HS(r, p)] == e); p++
      :: else -> break
      od;
      has_met = ok;
      MAY_DIE;
      if :: has_met -> Read() :: else fi
#endif
    :: else -> /* Begin, StoreAtPeers */
      has_met = ok;
      if
      :: ok ->
        POST_PEERS(way_room, room);
        MAY_DIE
      :: else
      fi
    fi;

    if
    :: KIND(e) == PART ->
      d_step { num_done[r]++; is_last = (num_done[r] == NB) }
      if
      :: is_last ->
        if
        :: has_met ->
          AWAIT(FENCE(r));
          POST_ALL(way_done, read_done);
        :: else
        fi;
        MAY_DIE;
        ok = has_met;
        p = 0;
#ifndef NO_ACK
        do
        :: p < N && ok -> WAIT(read_done[HS(r, p)] == e); p++
        :: else -> break
        od;
#endif
        skip; /* NoneHasFailed */
        d_step {
          h = 0;
          do
          :: h < N ->
#ifndef NO_TOLD
             if :: told[HS(r, h)] -> ok = 0 :: else fi;
#endif
             h++
          :: else -> break
          od; h = 0;
          if :: has_failed[r] || abort_[r] -> ok = 0 :: else fi
        }
        d_step { num_done[r] = 0; turn[r] = e }
      :: else ->
        ok = 1 /* the last block has the verdict, of what this one has read, too */
      fi;
      /* Non-last blocks hand their dirt to the last one. */
      if
      :: is_dirty -> bad_read[r] = 1
      :: else
      fi;
      if
      :: is_last && ok -> is_clean_result[r] = 1
      :: is_last && !ok -> is_clean_result[r] = 0
      :: else
      fi
    :: KIND(e) == BLOCKS ->
      ok = has_met;
      if
      :: has_met ->
        AWAIT(FENCE(r));
        POST_PEERS(way_pushed, pushed);
        /* NoneHasFailed: thread p looks at told[p]; all look at has_failed and abort. */
        d_step {
          do
          :: h < N -> sees[h] = 0;
#ifndef NO_TOLD
             if :: told[HS(r, h)] -> sees[h] = 1 :: else fi;
#endif
             if :: has_failed[r] || abort_[r] -> sees[h] = 1 :: else fi;
             if :: sees[h] -> ok = 0 :: else fi; h++
          :: else -> break
          od; h = 0
        }
      :: else
      fi;
      MAY_DIE;
      d_step { num_done[r]++; if :: num_done[r] == NB -> num_done[r] = 0; turn[r] = e :: else fi }
#ifndef NO_ACK
      p = 0;
      is_last = ok; /* what the block has found so far; below `ok` is of one wait */
      do
      :: p < N && has_met ->
         if
         :: p != r -> ok = 1; WAIT(pushed[HSB(e, r, p, b)] == e); is_last = is_last && ok
         :: else
         fi;
         p++
      :: else -> break
      od;
      ok = is_last && has_met;
#endif
      assert(!(ok && is_dirty)) /* a result that stands was read from operands that stood */
    :: else -> /* PUSH: PushedBarrier, EndEpoch, AddStored */
      if
      :: has_met ->
        AWAIT(FENCE(r));
        POST_PEERS(way_pushed, pushed);
        MAY_DIE;
        p = 0;
        do
        :: p < N && ok -> if :: p != r -> WAIT(pushed[HSB(e, r, p, b)] == e) :: else fi; p++
        :: else -> break
        od
      :: else
      fi;
      skip;
      d_step { num_done[r]++; if :: num_done[r] == NB -> num_done[r] = 0; turn[r] = e :: else fi }
      p = 0;
      do
      :: p < N && ok ->
         d_step { assert(p == r || room[HSB(e, r, p, b)] == e) } /* not the call after next's */
         p++
      :: else -> break
      od;
      skip
    fi;

    /* The kernel's end: all blocks are through, all stores have arrived. */
    d_step { num_out[r]++; is_last = (num_out[r] == NB) }
    if
    :: is_last ->
      AWAIT(FENCE(r));
      d_step {
        if
        :: KIND(e) == PART ->
           assert(!(is_clean_result[r] && bad_read[r]));
           bad_read[r] = 0
        :: else
        fi;
        num_out[r] = 0; has_ended[r] = e; kernel[r] = e + 1
      }
    :: else
    fi;
    e++
  od;
stop:
  num_over++
}

init {
  byte i;
  atomic {
    i = 0;
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
  i = 0;
  do
  :: i < N && any_failed -> if :: is_dead[i] || is_dead[N - 1] :: else -> (abort_[i]) fi; i++
  :: else -> break
  od
}
