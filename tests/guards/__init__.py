"""House rules as tests: imports, sizes, exports, executed documents, settings, words."""
