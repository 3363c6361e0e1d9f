//! Tables of CRC-64/NVME for eight bytes at once.

/// The polynomial, reflected.
const POLYNOMIAL: u64 = 0x9A6C_9329_AC4B_C9B5;
/// Values of a table.
const VALUES: usize = 256;

/// Returns eight tables after each other: table k is for bytes that k bytes follow.
pub(crate) fn tables() -> Vec<u64> {
    let mut tables: Vec<u64> = vec![0; 8 * VALUES];
    for byte in 0..VALUES {
        let step = |crc: u64| if crc & 1 == 1 { (crc >> 1) ^ POLYNOMIAL } else { crc >> 1 };
        tables[byte] = (0..8).fold(byte as u64, |crc, _| step(crc));
    }
    for at in VALUES..8 * VALUES {
        let before: u64 = tables[at - VALUES];
        tables[at] = tables[(before & 0xff) as usize] ^ (before >> 8);
    }
    tables
}
