"""Programs written in the style of the original, unmodified, as processes of their own and in this one."""
