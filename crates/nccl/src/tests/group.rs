//! Operations that succeed, in worlds of 1 to 8.

use std::time::Instant;

use super::{PATIENT, Rank, on_each};
use crate::{Batch, DataType, Progress, ReduceOp};

fn bytes_of<T: Copy, const N: usize>(values: &[T], to: fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|value| to(*value)).collect()
}

#[test]
fn all_types_are_summed_in_all_worlds() {
    for world in 1..=8 {
        on_each(world, |library, id, rank| {
            let mut me = Rank::start(library, id, world, rank).unwrap().ready().unwrap();
            let total: i64 = (1..=world as i64).sum();
            let mine: i64 = rank as i64 + 1;
            let cases: [(DataType, Vec<u8>, Vec<u8>); 4] = [
                (
                    DataType::I64,
                    bytes_of(&[mine << 40, -mine], i64::to_le_bytes),
                    bytes_of(&[total << 40, -total], i64::to_le_bytes),
                ),
                (
                    DataType::I32,
                    bytes_of(&[mine as i32, 7], i32::to_le_bytes),
                    bytes_of(&[total as i32, 7 * world as i32], i32::to_le_bytes),
                ),
                (
                    DataType::F32,
                    bytes_of(&[mine as f32 / 2.0, 0.0], f32::to_le_bytes),
                    bytes_of(&[total as f32 / 2.0, 0.0], f32::to_le_bytes),
                ),
                (
                    DataType::BF16,
                    bytes_of(&[bf16(mine as f32), bf16(0.5)], u16::to_le_bytes),
                    bytes_of(&[bf16(total as f32), bf16(0.5 * world as f32)], u16::to_le_bytes),
                ),
            ];
            for (data, part, sum) in cases {
                me.put(&part);
                let (at, raw, count) = (me.at(0), me.raw(), part.len() / data.bytes());
                // SAFETY: the buffer holds `count` elements, and `get` waits.
                let started =
                    unsafe { me.comm.all_reduce(at, at, count, data, ReduceOp::Sum, raw) };
                started.unwrap();
                assert_eq!(me.get(sum.len()), sum, "{data:?}, rank {rank} of {world}");
            }
        });
    }
}

/// Small integers and halves are exact in bf16.
fn bf16(value: f32) -> u16 {
    (value.to_bits() >> 16) as u16
}

#[test]
fn parts_are_scattered_gathered_and_copied() {
    let world = 3;
    on_each(world, |library, id, rank| {
        let mut me = Rank::start(library, id, world, rank).unwrap().ready().unwrap();
        let row = |scale: i32| [scale, 10 * scale, 100 * scale];
        // Every rank gets the sum of one column of ranks' rows.
        me.put(&bytes_of(&row(rank as i32 + 1), i32::to_le_bytes));
        let (own, all, raw) = (me.at(4 * rank), me.at(0), me.raw());
        // SAFETY: the buffer holds three elements, and `get` waits.
        let started =
            unsafe { me.comm.reduce_scatter(all, own, 1, DataType::I32, ReduceOp::Sum, raw) };
        started.unwrap();
        let sums = bytes_of(&row(6), i32::to_le_bytes);
        assert_eq!(me.get(12)[4 * rank..][..4], sums[4 * rank..][..4]);
        // And all of them afterwards.
        // SAFETY: as above.
        unsafe { me.comm.all_gather(own, all, 1, DataType::I32, raw) }.unwrap();
        assert_eq!(me.get(12), sums);
        for root in 0..world {
            me.put(&[rank as u8; 100]);
            // SAFETY: the buffer holds 100 bytes, and `get` waits.
            unsafe { me.comm.broadcast(all, all, 100, DataType::U8, root, raw) }.unwrap();
            assert_eq!(me.get(100), [root as u8; 100]);
        }
    });
}

#[test]
fn ranks_pass_something_round_in_a_circle() {
    let world = 4;
    on_each(world, |library, id, rank| {
        let mut me = Rank::start(library, id, world, rank).unwrap().ready().unwrap();
        me.put(&[rank as u8; 16]);
        let mut batch = Batch::new();
        batch.recv(me.at(8), 8, DataType::U8, (rank + world - 1) % world);
        batch.send(me.at(0), 8, DataType::U8, (rank + 1) % world);
        // SAFETY: both halves lie inside the buffer, and `get` waits.
        unsafe { me.comm.exchange(&batch, me.raw()) }.unwrap();
        let expected = [[rank as u8; 8], [((rank + world - 1) % world) as u8; 8]].concat();
        assert_eq!(me.get(16), expected);
    });
}

#[test]
fn operations_of_all_kinds_start_together() {
    let world = 2;
    on_each(world, |library, id, rank| {
        let mut me = Rank::start(library, id, world, rank).unwrap().ready().unwrap();
        me.put(&[rank as u8 + 1; 32]);
        let mut batch = Batch::new();
        batch.all_reduce(me.at(0), me.at(0), 4, DataType::U8, ReduceOp::Sum);
        batch.broadcast(me.at(4), me.at(4), 4, DataType::U8, 1);
        batch.reduce_scatter(me.at(8), me.at(8 + 4 * rank), 4, DataType::U8, ReduceOp::Max);
        batch.all_gather(me.at(16 + 4 * rank), me.at(16), 4, DataType::U8);
        batch.recv(me.at(24), 4, DataType::U8, 1 - rank);
        batch.send(me.at(28), 4, DataType::U8, 1 - rank);
        // SAFETY: all parts lie inside the buffer and apart, and `get` waits.
        unsafe { me.comm.exchange(&batch, me.raw()) }.unwrap();
        let got = me.get(32);
        assert_eq!((&got[..4], &got[4..8]), (&[3; 4][..], &[2; 4][..]));
        assert_eq!(got[8 + 4 * rank..][..4], [2; 4]);
        assert_eq!((&got[16..20], &got[20..24]), (&[1; 4][..], &[2; 4][..]));
        assert_eq!(got[24..28], [2 - rank as u8; 4]);
    });
}

#[test]
fn the_first_operation_is_in_progress_and_a_group_closes_in_agreement() {
    let world = 2;
    on_each(world, |library, id, rank| {
        let mut me = Rank::start(library, id, world, rank).unwrap().ready().unwrap();
        assert_eq!(me.comm.poll().unwrap(), Progress::Done);
        me.put(&[1; 8]);
        let (at, raw) = (me.at(0), me.raw());
        // SAFETY: the buffer holds one element, and `get` waits.
        let first = unsafe { me.comm.all_reduce(at, at, 1, DataType::I64, ReduceOp::Max, raw) };
        assert_eq!(first.unwrap(), Progress::Going, "connections are made in the background");
        assert_eq!(me.get(8), [1; 8]);
        let aborter = me.comm.aborter();
        me.comm.close(Instant::now() + PATIENT, || false).unwrap();
        assert!(aborter.is_aborted(), "nothing is left to abort");
        aborter.abort(PATIENT).expect("aborting what is closed changes nothing");
    });
}
