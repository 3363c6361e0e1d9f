//! Tables of CRC-64/NVME for eight bytes at once.

/// The polynomial, reflected.
const POLYNOMIAL: u64 = 0x9A6C_9329_AC4B_C9B5;
/// Values of a table.
const VALUES: usize = 256;

/// Returns eight tables after each other: table k is for bytes that k bytes follow.
pub(crate) fn tables() -> Vec<u64> {
    let step = |crc: u64| if crc & 1 == 1 { (crc >> 1) ^ POLYNOMIAL } else { crc >> 1 };
    let alone = |byte: usize| (0..8).fold(byte as u64, |crc, _| step(crc));
    let mut tables: Vec<u64> = (0..VALUES).map(alone).collect();
    for at in VALUES..8 * VALUES {
        let before: u64 = tables[at - VALUES];
        tables.push(tables[(before & 0xff) as usize] ^ (before >> 8));
    }
    tables
}
