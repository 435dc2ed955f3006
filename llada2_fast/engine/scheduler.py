"""Who runs: admission by pages, preemption, and what goes into the next step.

Every request reserves the pages of its prompt and its whole budget before it runs, so nothing runs out of memory half
way. Waiting requests are admitted in order, nobody overtakes the first. A request's place in the order is fixed when it
arrives: its arrival, less `priority_s` seconds per unit of priority; so a higher priority goes first and a lower one
does not wait for ever. A request that does not fit preempts running ones of lower priority that stand behind it in the
order: they lose their pages and the open block, and go on from their last finished block later.
"""

from bisect import insort
from collections import Counter
from typing import NamedTuple

from .request import RUNNING, WAITING, QueueFull, Request


class Plan(NamedTuple):
    """What one step does: rows that have started are refined, others have some blocks of their prompt prefilled."""

    denoise: list[Request]
    prefill: list[tuple[Request, int]]  # (request, number of blocks)

    def requests(self):
        return [*self.denoise, *(request for request, _ in self.prefill)]


class Scheduler:
    """waiting: in order; running: in order of admission. Moves rows in and out of the slots of a BlockDecoder."""

    def __init__(self, config, decoder, cache, clock):
        self.config, self.decoder, self.cache, self.clock = config, decoder, cache, clock
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.prefill_blocks = max(1, config.max_num_batched_tokens // cache.block_length)
        self.preemptions = 0
        self._stuck = False  # the first waiting request does not fit, and nothing has changed since

    @property
    def has_room(self):
        """One more request may wait."""
        return len(self.waiting) < self.config.max_waiting

    def add(self, request):
        """Let a request wait. QueueFull if too many do already."""
        if not self.has_room:
            raise QueueFull(
                f"request {request.request_id}: {len(self.waiting)} requests are waiting and "
                f"max_waiting={self.config.max_waiting} may"
            )
        self._enqueue(request)

    def remove(self, request):
        """Drop a waiting or running request; its slot and pages are free at once."""
        if request.status == RUNNING:
            self.running.remove(request)
            self.decoder.close(request.row.slot)
        else:
            self.waiting.remove(request)
        self._stuck = False

    def schedule(self):
        """Admit and preempt; returns the Plan of the next step, empty lists if there is nothing to do."""
        self._admit()
        plan, room = Plan([], []), self.prefill_blocks
        for request in self.running:
            row = request.row
            if not row.started:
                self._share(request)
                pending = row.block - row.settled
                if pending <= room:  # what is left of the prompt is carried along with the first denoise forward
                    self.decoder.start(row)
                    room -= pending
                elif room:
                    plan.prefill.append((request, room))
                    room = 0
            if row.started:
                plan.denoise.append(request)
        return plan

    def _enqueue(self, request):
        request.status = WAITING
        insort(self.waiting, request, key=lambda waiting: waiting.order)
        self._stuck = False

    def _admit(self):
        while self.waiting and not self._stuck:
            request = self.waiting[0]
            victims = [] if self._fits(request, []) else self._victims(request)
            if victims is None:
                self._stuck = True
                return
            self.waiting.pop(0)
            for victim in victims:
                self._preempt(victim)
            self._place(request)

    def _fits(self, request, gone):
        """Would there be a slot and pages for the request if the requests in `gone` had left?"""
        if len(self.running) - len(gone) >= self.config.max_num_seqs:
            return False
        held = Counter(page for other in gone for page in other.row.pages)

        def is_free(page):
            return self.cache.count(page) == held[page]

        found = self.cache.find(request.keys)
        free = self.cache.num_free + sum(map(is_free, held)) - sum(map(is_free, found))
        return request.num_blocks - len(found) <= free

    def _victims(self, request):
        """The fewest running requests that must go for this one, lowest priority and latest first; None: it waits."""
        lower = [r for r in self.running if r.priority < request.priority and r.order > request.order]
        lower.sort(key=lambda r: (r.priority, -r.order[0], -r.order[1]))
        return next((lower[:n] for n in range(1, len(lower) + 1) if self._fits(request, lower[:n])), None)

    def _preempt(self, request):
        self.running.remove(request)
        self.decoder.suspend(request.row)
        request.preemptions += 1
        self.preemptions += 1
        self._enqueue(request)

    def _place(self, request):
        """Reserve pages, those of known blocks among them, and put the request's row into a free slot."""
        if request.row is None:
            prompt = self.decoder.state.tokens.new_tensor(request.prompt)
            request.row = self.decoder.new_row(prompt, request.params, request.seed, request.eos_ids)
            request.admitted = self.clock()
        found = self.cache.find(request.keys)
        self.cache.share(found)
        row = request.row
        row.pages = found + self.cache.allocate(request.num_blocks - len(found))
        row.settled = request.published = len(found)
        request.shared_tokens += len(found) * row.length
        self.decoder.place(self.decoder.rows.index(None), row)
        request.status = RUNNING
        self.running.append(request)

    def _share(self, request):
        """Take over blocks that somebody else has finished since the request was admitted."""
        row = request.row
        found = self.cache.find(request.keys[row.settled :])
        if found:
            self.cache.share(found)
            end = row.settled + len(found)
            self.cache.free(row.pages[row.settled : end])
            row.pages = row.pages[: row.settled] + found + row.pages[end:]
            row.settled = request.published = end
            self.decoder.forward.open(row)  # it has other pages now
            request.shared_tokens += len(found) * row.length
            self._stuck = False
