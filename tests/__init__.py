"""The tests mirror src/triton_distributed; `guards` holds the house rules, `leaks` and `timing` serve every test."""
