/* CloseBlocks of xla_ffi/device/call.cuh alone: three ranks of NB blocks that have met read one
 * another's operands, and part block by block. Any wait may give up at any time. Small enough to be
 * searched to the end with several blocks of a rank, which meeting.pml is not.
 *
 * What a block tells arrives everywhere at once; what Fail tells, rank by rank. Reading is one
 * moment, the last before the block tells: `has_ended` and `is_poisoned` only grow. A block reads
 * operands of its peers, and what their like blocks have written of a result (a two-shot).
 *
 *   ONE_GIVES_UP  only the first block of rank 0 does: fewer states
 *   TWO_GIVE_UP   only rank 0, and the first block of rank 2
 * Each of these takes a part of the protocol away:
 *   CUT_BY_TOLD  a block that was told of a failure does not wait, though others do not know yet
 *   ONE_FLAG     NotePeerFailure sets has_failed, so that Fail of another block tells nobody; it
 *                then depends on the rank that tells, which may be killed
 *   NO_TELLER    Fail of a second block does not wait until the first has told everyone
 */
#ifndef N
#define N 3
#endif
#ifndef NB
#define NB 2
#endif
bit pushed[N * NB]; /* [source, block] */
bit told[N * N];    /* [holder, source] */
bit abort_[N];
bit has_failed[N];
bit has_ended[N];
bit is_poisoned[N * NB]; /* [source, block]: its part of the result */
byte num_out[N];
bit any_failed;

#define THERE(p) (!waits[p] || pushed[(p) * NB + b])
#if N == 2
#define ALL_THERE (THERE(0) && THERE(1))
#else
#define ALL_THERE (THERE(0) && THERE(1) && THERE(2))
#endif
#ifdef ONE_GIVES_UP
#define MAY_GIVE_UP (r == 0 && b == 0)
#elif defined(TWO_GIVE_UP)
#define MAY_GIVE_UP (r == 0 || (r == 2 && b == 0))
#else
#define MAY_GIVE_UP true
#endif

proctype Block(byte r; byte b) {
  byte p, h;
  bit ok = 1, is_dirty;
  bit waits[N];
  /* Reads in place. */
  d_step {
    do
    :: p < N -> if :: has_ended[p] || is_poisoned[p * NB + b] -> is_dirty = 1 :: else fi; p++
    :: else -> break
    od; p = 0
  }
  pushed[r * NB + b] = 1; /* TellBlocks */
  d_step {                /* NoneHasFailed, and who waits */
    do
    :: p < N ->
       waits[p] = (p != r);
       if
       :: abort_[r] -> ok = 0; waits[p] = 0
       :: !abort_[r] && (told[r * N + p] || has_failed[r]) -> ok = 0;
#ifdef CUT_BY_TOLD
          waits[p] = 0
#endif
       :: else
       fi;
       p++
    :: else -> break
    od; p = 0
  }
  /* AwaitBlocks: a thread for each peer. */
  if
  :: ALL_THERE
  :: !(ALL_THERE) && abort_[r] -> ok = 0
  :: atomic { !(ALL_THERE) && !abort_[r] && MAY_GIVE_UP -> ok = 0; any_failed = 1 }
     if
     :: atomic { !has_failed[r] -> has_failed[r] = 1 } /* Fail */
        do
        :: atomic { h < N -> told[h * N + r] = 1; h++ }
        :: atomic { h == N -> h = 0 }; break
        od;
        do
        :: atomic { h < N -> abort_[h] = 1; h++ }
        :: else -> break
        od
     :: else /* another block of this rank tells */
#ifndef NO_TELLER
        -> abort_[r]
#endif
     fi
  fi;
  assert(!(ok && is_dirty));
  if :: !ok -> is_poisoned[r * NB + b] = 1 :: else fi;
  atomic { /* NotePeerFailure; the kernel's end */
    if
#ifdef ONE_FLAG
    :: !ok ->
       p = 0;
       do
       :: p < N -> if :: told[r * N + p] -> has_failed[r] = 1 :: else fi; p++
       :: else -> break
       od
#endif
    :: else
    fi;
    num_out[r]++;
    if :: num_out[r] == NB -> has_ended[r] = 1 :: else fi
  }
}

init {
  byte i;
  atomic {
    do
    :: i < N * NB -> run Block(i / NB, i % NB); i++
    :: else -> break
    od
  }
  i = 0;
  do
  :: i < N -> has_ended[i]; i++
  :: else -> break
  od;
  /* What one rank has found, all know. */
  assert(!any_failed || (abort_[0] && abort_[1] && abort_[N - 1]))
}
