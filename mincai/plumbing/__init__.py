"""What every stage needs and no reader has to know: flags, files, checkpoints, vocabularies,
processes, memory."""
