/* Small sums: each block of a rank stores its part in a slot of each peer, waits for the parts of
 * the peers, and empties their slots. The next call of a rank begins when all its blocks have
 * ended. Stores take any time to arrive.
 *
 * Asserted: a store finds its slot empty, and a reader finds the part of its own call.
 *
 * N ranks of NB blocks make E calls. Mutants: ONE_HALF, where slots have no halves; SILENT, where
 * rank 0 sends nothing in its second call and nobody waits for it.
 */
#ifdef ONE_HALF
#define HALF(e) 0
#else
#define HALF(e) ((e) % 2)
#endif
#ifdef SILENT
#define SENDS(r, e) (!((r) == 0 && (e) == 2))
#else
#define SENDS(r, e) 1
#endif
#define AT(holder, source, e, b) ((((holder) * N + (source)) * 2 + HALF(e)) * NB + (b))
#define SLOTS (N * N * 2 * NB)

byte slot[SLOTS];     /* 0: empty; or the call whose part it holds */
byte on_its_way[SLOTS];
byte num_ended[N * (E + 1)];

active proctype Link() {
  byte i;
  do
  :: atomic {
       select(i : 0 .. SLOTS - 1);
       if
       :: on_its_way[i] != 0 ->
          assert(slot[i] == 0);
          slot[i] = on_its_way[i];
          on_its_way[i] = 0
       :: else
       fi;
       i = 0
     }
  od
}

proctype Block(byte r, b) {
  byte e = 1, p;
  do
  :: e > E -> break
  :: else ->
     (e == 1 || num_ended[r * (E + 1) + e - 1] == NB);
     p = 0;
     do
     :: p == N -> break
     :: else ->
        if
        :: p != r && SENDS(r, e) ->
           atomic {
             assert(on_its_way[AT(p, r, e, b)] == 0);
             on_its_way[AT(p, r, e, b)] = e
           }
        :: else
        fi;
        p++
     od;
     p = 0;
     do
     :: p == N -> break
     :: else ->
        if
        :: p != r && SENDS(p, e) ->
           slot[AT(r, p, e, b)] != 0;
           assert(slot[AT(r, p, e, b)] == e);
           slot[AT(r, p, e, b)] = 0
        :: else
        fi;
        p++
     od;
     num_ended[r * (E + 1) + e]++;
     e++
  od
}

init {
  byte r, b;
  atomic {
    r = 0;
    do
    :: r == N -> break
    :: else ->
       b = 0;
       do
       :: b == NB -> break
       :: else -> run Block(r, b); b++
       od;
       r++
    od
  }
}
