"""An endpoint as one connection calls it: its client, its decoder, and the instances whose contracts do not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from triton_distributed.api.contracts import Contract, ContractMismatch
from triton_distributed.api.schema import differences, ignored
from triton_distributed.calling.call import Call
from triton_distributed.calling.items import ItemDecoder
from triton_distributed.names import Instance
from triton_distributed.routing.load import LoadBook
from triton_distributed.routing.policies import Direct, Policy
from triton_distributed.runtime.client import Client
from triton_distributed.serving.signatures import made

logger = logging.getLogger("triton_distributed.runtime")


class Target:
    """An endpoint that a connection calls.

    Args:
        client: its client.
        contract: its contract; None if the caller gave only a name.

    Attributes:
        decoder: decodes items to the contract's type; None for plain values.

    Raises:
        TypeError: values of the contract's types cannot be checked.
    """

    __slots__ = ("_contract", "_ignored", "_unfit", "client", "decoder")

    def __init__(self, client: Client, contract: Contract[Any, Any] | None) -> None:
        self.client = client
        self._contract = contract
        self._unfit: dict[int, ContractMismatch] = {}
        self._ignored: set[str] = set()
        self.decoder: ItemDecoder | None = None
        if contract is not None:
            if contract.types.answer is not Any:
                self.decoder = made(f"{contract!r}: its answer", ItemDecoder, contract.types.answer)
            if contract.schema is not None:
                client.candidates.table.listeners.append(self._compare)
                self._compare()

    def _compare(self) -> None:
        """Compare the contract with those of the present instances, after each change of them."""
        unfit: dict[int, ContractMismatch] = {}
        contract = self._contract
        assert contract is not None
        assert contract.schema is not None
        for each in self.client.candidates.table.instances:
            if each.contract is not None and (found := _compared(differences, contract.schema, each.contract)):
                unfit[each.id] = ContractMismatch(contract.name.path, each.id, found)
            elif each.contract is not None:
                self._warn_of_ignored(contract, each.contract)
        self._unfit = unfit
        self.client.limit(self.choose if unfit else None)

    def _warn_of_ignored(self, contract: Contract[Any, Any], theirs: Mapping[str, Any]) -> None:
        """Log once each field that one side sends and the other does not know: it may be misspelt."""
        assert contract.schema is not None
        for each in _compared(ignored, contract.schema, theirs):
            if each not in self._ignored:
                self._ignored.add(each)
                logger.warning("%s: %s", contract.name, each)

    def start(self, request: Any, policy: Policy, options: Mapping[str, Any], encoded: bytes | None = None) -> Call:
        """Start a call whose answer is a stream, as `Connection.stream` does; see there.

        Args:
            request: the request.
            policy: chooses the instance.
            options: see `StreamOptions`, without `policy`.
            encoded: the encoded request, if the caller has encoded it.

        Returns:
            The call itself, which has no `ItemStream`: its owner reads it, and calls `leave` if it does not read to the
            end.
        """
        return self.client.start(
            "Connection.stream", request, policy, False, False, options, encoded, self.decoder, True
        )

    def close(self) -> None:
        """Compare no more."""
        self.client.limit(None)
        listeners = self.client.candidates.table.listeners
        if self._compare in listeners:
            listeners.remove(self._compare)

    def choose(self, policy: Policy, request: Any, instances: tuple[Instance, ...], load: LoadBook) -> Instance:
        """Choose with a policy among the instances whose contracts fit.

        Raises:
            ContractMismatch: no offered instance fits.
        """
        if isinstance(policy, Direct):
            return policy(request, instances, load)
        unfit = self._unfit
        fit = tuple(each for each in instances if each.id not in unfit)
        if not fit:
            known = unfit[instances[0].id]
            raise ContractMismatch(known.endpoint, known.instance_id, known.differences)
        return policy(request, fit, load)


def _compared(
    compare: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]],
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
) -> list[str]:
    try:
        return compare(ours, theirs)
    except Exception:  # The worker may run a later version, with other schemas. Values are still checked.
        return []
