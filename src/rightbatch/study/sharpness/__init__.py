"""Whether small batches end in flatter places than large ones, on this workload."""

from rightbatch.study.sharpness.compare import compare_sharpness as compare_sharpness
