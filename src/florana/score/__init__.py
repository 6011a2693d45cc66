"""What a model wrote, judged: answers extracted and compared, programs run against their tests. Pure Python."""
