"""The sum is the one of the reference implementation, at each length where it is made another way."""

from __future__ import annotations

import pytest

from hq_backups.engine.couch.xxh3 import xxh3_128

# From the xxHash library 0.8: what follows is the sum of so many bytes 0, 1, 2 … 250, 0, 1 …
VECTORS = {
    0: "99aa06d3014798d86001c324468d497f",
    1: "a6cd5e9392000f6ac44bdff4074eecdb",
    2: "6a4a5274c1b0d3add6645fc3051a9457",
    3: "e3b55f57945a17cf5f4299fc161c9cbb",
    4: "eb70bf5fc779e9e6a6111d53e80a3db5",
    5: "9434532106a7c141c920d2347a85929b",
    8: "e1e4432a62217fe4cfd50c61c8bb98c1",
    9: "16c769d83e4aebce907931979dca3746",
    12: "38f92247a7f73cc57780eb31198f13ca",
    16: "72950631827607e2842812cc870dcae2",
    17: "685bc458b37d057fc06e233df7729217",
    31: "4ed3946d393b687bb54de3993874ed20",
    32: "25e7c9b3424ceed2457d9566b6fcd697",
    33: "02175c3aabb00637e08d84951339de86",
    64: "9c6e140a465545e590c1971ddb04ce74",
    65: "ebedf05eeadc28f11aee64a1615de88f",
    96: "c57556e9ccb97efa6e53ab55b4f5558b",
    97: "9b09227e063da5a25b3284a61f91e97d",
    128: "14792fc3af88dc6c05321a0b64d67b41",
    129: "dd5e74ac6b45f54ebc30b63382b09a3b",
    144: "2615894ae020ac91582a8a72e9d47a4d",
    160: "4e95c1cd6dc7bb85c67fcd13c31b09f4",
    161: "90805aa22c17b7a036ade0cea58f8377",
    192: "10c987dc285c756b050f429c4f52b688",
    239: "9843ab31a06be0dffe21374628fcc539",
    240: "65b5be86da5540e7c92b68e16f83bbb6",
    241: "1da1cb61bcb8a2a102e8cd95421c6d02",
    256: "96c36c85d00e5bc544f5d90dacde463a",
    511: "e8d4474ecc01a76b455cffca2755aa1e",
    512: "5884ea91ad7102d75c021aac13954143",
    513: "b2c5a3216bea49d24ee4eacf61b5e833",
    1023: "4325711b0ed4d742d3d91d80ac495685",
    1024: "d0ac1f7b93bf57b9e5d78bafa45b2aa5",
    1025: "2882ebca04ec915ce95c42288f28186e",
    1088: "295519bc52981c5c1a848d807034c403",
    1089: "bd054149e0f6660ea51e35ec282cb1d8",
    2048: "a5141efedfefc1af25339063db861586",
    2049: "39a54bc93f74921b6c9600c0e506e2ae",
    5000: "b92ec02c39d33ce7b418500fc42320ee",
    100001: "72cb6ce4c739465b01aa99e18506ba0a",
}


@pytest.mark.parametrize("length", VECTORS)
def test_the_sum_is_the_reference_implementations(length: int) -> None:
    assert xxh3_128(bytes(n % 251 for n in range(length))).hex() == VECTORS[length]
