"""Arrays that reach a device together."""

import numpy as np
import torch
from octavo_engine.staging import upload_together


def test_arrays_of_several_types_arrive_whole_and_aligned() -> None:
    arrays = {
        "odd": np.arange(3, dtype=np.int32),
        "none": np.zeros(0, np.int64),
        "wide": np.array([-1, 2**40, 7], np.int64),
        "last": np.array([5], np.int32),
    }
    uploaded = upload_together(arrays, torch.device("cpu"))
    start = uploaded["odd"].data_ptr()
    for name, array in arrays.items():
        torch.testing.assert_close(uploaded[name], torch.from_numpy(array), rtol=0, atol=0)
        assert (uploaded[name].data_ptr() - start) % 16 == 0 or not len(array)
