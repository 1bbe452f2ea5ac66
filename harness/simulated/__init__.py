"""A whole system of workers, clients, network and registry in one thread, under faults, in virtual time."""
