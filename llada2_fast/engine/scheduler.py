"""Who runs: admission by pages, preemption, and what goes into the next step. Pages are taken and given here alone.

Every request reserves the pages of its prompt, its whole budget and its window passes before it runs, so nothing runs
out of memory half way. Waiting requests are admitted in order. A request's place in the order is fixed when it arrives:
its arrival, less `priority_s` seconds per unit of priority; so a higher priority goes first and a lower one does not
wait for ever. A request that does not fit preempts running ones of lower priority that stand behind it in the order:
they lose their pages and the open block, and go on from their last finished block later. While the first waits for
pages, later ones that fit may pass it, MAX_PASSES in all; of those behind it the first MAX_LOOKED_AT are looked at.
"""

from bisect import insort
from collections import Counter
from typing import NamedTuple

from ..cache import block_hashes
from ..decoding.sequence import Phase
from .request import QueueFull, Request

MAX_PASSES = 16
MAX_LOOKED_AT = 16
WORTH_WAITING = 4  # blocks of a prompt that somebody ahead is making: it waits a step or two rather than make them, too


class Work(NamedTuple):
    """What one step does: some requests' blocks are refined, others have some blocks of their prompt prefilled."""

    denoise: list[Request]
    prefill: list[tuple[Request, int]]  # (request, number of blocks)

    def requests(self):
        return [*self.denoise, *(request for request, _ in self.prefill)]


def _order(request):
    return request.order


class Scheduler:
    """waiting: in order; running: in order of admission.

    config: EngineConfig.
    decoder: the BlockDecoder whose lanes requests are admitted to when their prompt is in the cache.
    cache: the PagedKVCache.
    clock: seconds.
    """

    def __init__(self, config, decoder, cache, clock):
        self.config, self.decoder, self.cache, self.clock = config, decoder, cache, clock
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.prefill_blocks = max(1, config.max_num_batched_tokens // cache.block_length)
        self.preemptions = 0
        self.turn: list[Request] = []  # whose work is being done: what goes wrong now is theirs
        self._stuck = False  # nobody who waits fits, and nothing has changed since

    @property
    def room(self) -> int:
        """How many more requests may wait; those for which a place is free do so until the next step only."""
        places = self.config.max_num_seqs - len(self.running)
        return self.config.max_waiting + places - len(self.waiting)

    @property
    def has_room(self) -> bool:
        return self.room > 0

    def check_room(self):
        """QueueFull if as many wait as may."""
        if not self.has_room:
            raise QueueFull(f"{len(self.waiting)} requests are waiting and max_waiting={self.config.max_waiting} may")

    def add(self, request: Request):
        """Let a request wait, whose blocks are hashed already."""
        insort(self.waiting, request, key=_order)
        self._stuck = False

    def restart(self, requests: list[Request]):
        """These requests wait, and nothing else is known."""
        self.running, self.waiting, self.turn = [], sorted(requests, key=_order), []
        self._stuck = False

    def suspend(self, request: Request):
        """Take a running request's lane and pages; it waits, and goes on from its last finished block."""
        self.running.remove(request)
        self._take_away(request)
        request.rewind()
        self.add(request)

    def remove(self, request: Request):
        """Drop a waiting or running request; its lane and pages are free at once."""
        if request.sequence.phase is Phase.WAITING:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
            self._take_away(request)
        self._stuck = False

    def schedule(self) -> Work:
        """Admit and preempt; returns the next step's work, empty lists if there is nothing to do."""
        self._admit()
        work, room = Work([], []), self.prefill_blocks
        made = set()  # hashes of blocks that will soon be there to share
        for request in self.running:
            self.turn, sequence = [request], request.sequence
            if sequence.phase is Phase.PREFILL:
                self._share(request)
                pending = sequence.block - sequence.num_final_blocks
                ahead = request.block_hashes[sequence.num_final_blocks :][:WORTH_WAITING]
                if len(ahead) == WORTH_WAITING and made.issuperset(ahead):
                    continue
                if pending <= room:  # what is left of the prompt is carried along with the first denoise forward
                    self.decoder.admit(sequence)
                    room -= pending
                elif room:
                    work.prefill.append((request, room))
                    room = 0
            if request.epoch == self.cache.epoch and request.num_inserted < sequence.first_block:
                made.update(request.block_hashes[request.num_inserted : sequence.first_block])
            if sequence.running:
                work.denoise.append(request)
        self.turn = work.requests()
        return work

    def insert(self, request: Request):
        """Let others match the blocks whose tokens and K/V are final. A denoise step without NaN has proved them all
        finite."""
        sequence = request.sequence
        kept = min(sequence.num_final_blocks, sequence.num_kept_blocks)
        whole = min(kept, sequence.limit // sequence.block_length)
        own = request.epoch == self.cache.epoch  # else they were computed before the cache was cleared
        if self.config.enable_prefix_caching and own and request.num_inserted < whole:
            self.hash(request)
            for block in range(request.num_inserted, whole):
                self.cache.insert(sequence.pages[block], request.block_hashes[block])
            request.num_inserted = whole
            self._stuck = False

    def hash(self, request: Request):
        """Name the blocks of a request that are known by now, and that no window pass revises any more."""
        sequence = request.sequence
        if self.config.enable_prefix_caching:
            salt = (request.options.cache_salt or "").encode(errors="surrogatepass")
            length, ids = sequence.block_length, sequence.ids
            if sequence.edit_window:
                ids = ids[: sequence.num_kept_blocks * length]
            request.block_hashes += block_hashes(ids, length, request.block_hashes, salt)

    def _admit(self):
        while self.waiting and not self._stuck:
            first = self.waiting[0]
            self.turn = [first]
            victims = [] if self._fits(first, []) else self._victims(first)
            request = first if victims is not None else self._passing(first)
            if request is None:
                self._stuck = True
                return
            for victim in victims or ():
                self.suspend(victim)
                victim.preemptions += 1
                self.preemptions += 1
            self.waiting.remove(request)
            self.turn = [request]
            self._place(request)

    def _passing(self, first):
        """A request behind the first one that fits where it does not; None: nobody does, or it was passed too often."""
        if first.num_passed == MAX_PASSES or len(self.running) >= self.config.max_num_seqs:
            return None
        later = self.waiting[1 : 1 + MAX_LOOKED_AT]
        request = next((request for request in later if self._fits(request, [])), None)
        first.num_passed += request is not None
        return request

    def _fits(self, request, gone):
        """Would there be a lane and pages for the request if the requests in `gone` had left?"""
        if len(self.running) - len(gone) >= self.config.max_num_seqs:
            return False
        held = Counter(page for other in gone for page in other.sequence.pages)

        def is_free(page):
            return self.cache.count(page) == held[page]

        found = self.cache.match_prefix(request.block_hashes)
        free = self.cache.num_free + sum(map(is_free, held)) - sum(map(is_free, found))
        return request.sequence.num_pages - len(found) <= free

    def _victims(self, request):
        """The fewest running requests that must go for this one, lowest priority and latest first; None: it waits."""
        lower = [r for r in self.running if r.priority < request.priority and r.order > request.order]
        lower.sort(key=lambda r: (r.priority, -r.order[0], -r.order[1]))
        return next((lower[:n] for n in range(1, len(lower) + 1) if self._fits(request, lower[:n])), None)

    def _take_away(self, request):
        """Free a request's lane and pages."""
        sequence = request.sequence
        self.decoder.release(sequence)
        self.cache.free(sequence.pages)
        sequence.pages = ()

    def _place(self, request):
        """Reserve pages, those of known blocks among them."""
        sequence = request.sequence
        request.admitted = self.clock() if request.admitted is None else request.admitted
        found = self.cache.match_prefix(request.block_hashes)
        request.epoch = self.cache.epoch
        self.cache.incref(found)
        sequence.pages = found + self.cache.allocate(sequence.num_pages - len(found))
        sequence.phase = Phase.PREFILL
        self._found(request, 0, found)
        self.running.append(request)

    def _share(self, request):
        """Take over blocks that somebody else has finished since the request was admitted."""
        sequence, begin = request.sequence, request.sequence.num_final_blocks
        found = self.cache.match_prefix(request.block_hashes[begin:])
        if found:
            end = begin + len(found)
            self.cache.incref(found)
            self.cache.free(sequence.pages[begin:end])
            sequence.pages = sequence.pages[:begin] + found + sequence.pages[end:]
            self._found(request, begin, found)
            self._stuck = False

    @staticmethod
    def _found(request, begin, pages):
        """Note that the blocks from `begin` on were found in the cache."""
        request.num_inserted = begin + len(pages)
        request.sequence.settle(begin + len(pages))
        before = request.shared_tokens if begin else 0  # none of an earlier place
        request.shared_tokens = before + len(pages) * request.sequence.block_length
