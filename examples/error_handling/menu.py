"""Our own error, which kitchen and guest both import."""


class SoldOut(Exception):
    """A dish is sold out; there are `tomorrow` portions tomorrow."""

    def __init__(self, dish: str, tomorrow: int):
        super().__init__(f"no {dish} left today")
        self.dish, self.tomorrow = dish, tomorrow
