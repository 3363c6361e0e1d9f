//! `lacuna watch` on a terminal: one screen with a run's figures, loss, workers and events.
//!
//! A thread owns the terminal: it takes updates, draws at most ten times a second, and listens to
//! keys. Quitting it stops nothing but the watching.

mod dashboard;

use std::io::IsTerminal as _;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lacuna_api::v1;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use tokio::sync::watch;

use dashboard::Dashboard;

/// Shortest time between two drawings, and longest that a key waits.
const FRAME: Duration = Duration::from_millis(100);
/// Updates that may wait to be shown.
const QUEUE: usize = 1024;

/// The terminal while a run is watched.
pub struct Screen {
    updates: Option<SyncSender<v1::WatchRunResponse>>,
    thread: Option<JoinHandle<()>>,
    quit: watch::Receiver<bool>,
}

impl Screen {
    /// Takes the terminal; the error says why it cannot be had.
    pub fn open() -> std::io::Result<Self> {
        if !std::io::stdout().is_terminal() {
            return Err(std::io::Error::other("stdout is not a terminal"));
        }
        let terminal = ratatui::try_init().inspect_err(|_| ratatui::restore())?;
        let (updates, inbox) = sync_channel(QUEUE);
        let (quitting, quit) = watch::channel(false);
        let work = move || {
            show(terminal, &inbox, &quitting);
            ratatui::restore();
        };
        let thread = std::thread::Builder::new().name("screen".to_string()).spawn(work);
        let thread = thread.inspect_err(|_| ratatui::restore())?;
        Ok(Screen { updates: Some(updates), thread: Some(thread), quit })
    }

    /// Shows an update.
    pub fn show(&self, update: v1::WatchRunResponse) {
        if let Some(updates) = &self.updates {
            // Fails where the thread is gone, which `quit` tells.
            let _ = updates.send(update);
        }
    }

    /// Returns what turns true when somebody wants to leave.
    pub fn quit(&self) -> watch::Receiver<bool> {
        self.quit.clone()
    }

    /// Gives the terminal back.
    pub fn close(&mut self) {
        self.updates = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was printed.
            let _ = thread.join();
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.close();
    }
}

fn show(
    mut terminal: DefaultTerminal,
    updates: &Receiver<v1::WatchRunResponse>,
    quitting: &watch::Sender<bool>,
) {
    let mut dashboard = Dashboard::default();
    let mut is_new = true;
    loop {
        if is_new && terminal.draw(|frame| dashboard.draw(frame)).is_err() {
            quitting.send_replace(true);
            return;
        }
        is_new = false;
        let end = Instant::now() + FRAME;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            match updates.recv_timeout(left) {
                Ok(update) => dashboard.take(update),
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return,
            }
            is_new = true;
        }
        while let Ok(true) = event::poll(Duration::ZERO) {
            match event::read() {
                Ok(Event::Key(key)) if leaves(&key) => _ = quitting.send_replace(true),
                Ok(Event::Resize(..)) => is_new = true,
                Ok(_) => {}
                Err(_) => _ = quitting.send_replace(true),
            }
        }
    }
}

/// Tells whether a key means to leave; in raw mode Ctrl-C is a key, too.
fn leaves(key: &KeyEvent) -> bool {
    let control_c = key.code == KeyCode::Char('c') && key.modifiers == KeyModifiers::CONTROL;
    let leaves = matches!(key.code, KeyCode::Char('q' | 'Q') | KeyCode::Esc) || control_c;
    key.kind == KeyEventKind::Press && leaves
}
