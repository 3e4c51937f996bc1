"""The bundle on disk: what it holds, how it is written, opened, proven and packed. Standard library only."""
