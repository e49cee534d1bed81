"""What tests share: running scripts, small files, synthetic worlds, clips, oracles."""
