"""An error of our own, which kitchen and guest both import."""


class SoldOut(Exception):
    """There is nothing left of a dish until `tomorrow`."""

    def __init__(self, dish: str, tomorrow: int):
        super().__init__(f"no {dish} left today")
        self.dish, self.tomorrow = dish, tomorrow
