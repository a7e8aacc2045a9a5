//! Requests that arrive together, served together: while some of a line are served the next ones gather, and are served as soon
//! as those are done. What each costs alone is mostly what all of them share, and nobody waits for others that are not there yet.
//!
//! It is no cache: whoever asks is served by work that began afterwards. One piece of work of a line is under way at a time. Each
//! stands back once before it begins, until its thread has nothing else to do or has done some sixty other things: answers leave,
//! and requests that are about to ask come along.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

/// What is done with those that have come together.
pub trait Serve: Send + Sync + 'static {
    /// Those of different lines do not wait for each other.
    type Line: Clone + Eq + Hash + Send + Sync;
    type Item: Send;
    type Answer: Send;

    /// Served at once. The rest waits for the next time.
    const MOST: usize;

    /// Longer than a signing key, a connection and a statement may take: a connection that is dead in silence must not hold up
    /// the next ones.
    const PATIENCE: Duration = Duration::from_secs(13);

    /// Answers those of `batch`, who are one at least. Whoever is dropped without an answer learns that there is none: all of
    /// them when this panics, or takes longer than it has patience for.
    fn serve(&mut self, line: &Self::Line, batch: Vec<Waiting<Self>>) -> impl Future<Output = ()> + Send;
}

/// Somebody who has asked. Is perhaps gone before the answer.
pub struct Waiting<S: Serve + ?Sized> {
    pub item: S::Item,
    pub answer: oneshot::Sender<S::Answer>,
}

/// Tells each its own answer, or all of them the same error.
pub fn answer_each<S, T, E>(batch: Vec<Waiting<S>>, answers: Result<Vec<T>, E>)
where
    S: Serve<Answer = Result<T, E>>,
    E: Clone,
{
    match answers {
        Ok(answers) => {
            for (Waiting { answer, .. }, own) in batch.into_iter().zip(answers) {
                // whoever asked may be gone
                let _ = answer.send(Ok(own));
            }
        }
        Err(error) => {
            for Waiting { answer, .. } in batch {
                let _ = answer.send(Err(error.clone()));
            }
        }
    }
}

/// Everybody who waits; one for the process. Bounded by the requests that are served at once.
pub struct Together<S: Serve>(Arc<Mutex<Lines<S>>>);

/// A line is there as long as somebody serves it.
type Lines<S> = HashMap<<S as Serve>::Line, Vec<Waiting<S>>>;

/// Whoever empties a line. When it is dropped half-way, those who wait learn it, and the next one is served by another.
struct Serving<S: Serve> {
    all: Together<S>,
    line: S::Line,
    emptied: bool,
}

impl<S: Serve> Together<S> {
    /// Waits for the answer. `None`: there is none, and it is not known what was done; it has been logged if it was a panic.
    /// `serving` is called when nobody serves the line.
    ///
    /// Cancelling this call leaves the item in the line: it is served, and the answer is lost.
    pub async fn ask(&self, line: S::Line, item: S::Item, serving: impl FnOnce() -> S) -> Option<S::Answer> {
        let (answer, answered) = oneshot::channel();
        let waiting = Waiting { item, answer };
        let unserved = match self.lines().entry(line) {
            Entry::Occupied(mut line) => {
                line.get_mut().push(waiting);
                None
            }
            Entry::Vacant(place) => {
                let line = place.key().clone();
                place.insert(vec![waiting]);
                Some(line)
            }
        };
        if let Some(line) = unserved {
            tokio::spawn(Serving { all: self.clone(), line, emptied: false }.run(serving()));
        }
        answered.await.ok()
    }

    fn lines(&self) -> MutexGuard<'_, Lines<S>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Serve> Serving<S> {
    async fn run(mut self, mut work: S) {
        loop {
            tokio::task::yield_now().await;
            let Some(batch) = self.next() else { return };
            // whoever has no answer by then is dropped with the work
            let _ = tokio::time::timeout(S::PATIENCE, work.serve(&self.line, batch)).await;
        }
    }

    /// `None`: nobody waits, and the line is no longer there.
    fn next(&mut self) -> Option<Vec<Waiting<S>>> {
        let mut lines = self.all.lines();
        let waiting = lines.get_mut(&self.line).filter(|waiting| !waiting.is_empty());
        let Some(waiting) = waiting else {
            lines.remove(&self.line);
            self.emptied = true;
            return None;
        };
        let some = waiting.len().min(S::MOST);
        Some(waiting.drain(..some).collect())
    }
}

impl<S: Serve> Drop for Serving<S> {
    fn drop(&mut self) {
        // one that was emptied is another's, if it is there
        if !self.emptied {
            let left = self.all.lines().remove(&self.line);
            drop(left);
        }
    }
}

impl<S: Serve> Clone for Together<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S: Serve> Default for Together<S> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<S: Serve> fmt::Debug for Together<S> {
    /// Without those who wait.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Together").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Semaphore;
    use tokio::task::JoinSet;

    use super::*;

    /// Doubles numbers when it is let; the first of its batches are so many.
    #[derive(Clone)]
    struct Doubling {
        permits: Arc<Semaphore>,
        batches: Arc<Mutex<Vec<(char, usize)>>>,
        served: Arc<AtomicUsize>,
    }

    const PANICS: u32 = 1_000;
    const UNANSWERED: u32 = 1_001;

    impl Serve for Doubling {
        type Line = char;
        type Item = u32;
        type Answer = u32;

        const MOST: usize = 4;

        async fn serve(&mut self, line: &char, batch: Vec<Waiting<Self>>) {
            self.batches.lock().unwrap().push((*line, batch.len()));
            self.permits.acquire().await.unwrap().forget();
            for Waiting { item, answer } in batch {
                match item {
                    PANICS => panic!("as asked"),
                    UNANSWERED => {}
                    number => {
                        self.served.fetch_add(1, Ordering::Relaxed);
                        let _ = answer.send(number * 2);
                    }
                }
            }
        }
    }

    struct Scene {
        together: Together<Doubling>,
        work: Doubling,
        asked: JoinSet<(u32, Option<u32>)>,
    }

    impl Scene {
        fn new(permits: usize) -> Self {
            let permits = Arc::new(Semaphore::new(permits));
            let work = Doubling { permits, batches: Arc::default(), served: Arc::default() };
            Self { together: Together::default(), work, asked: JoinSet::new() }
        }

        /// In which one is being served until there are permits.
        async fn serving(line: char, first: u32) -> Self {
            let mut scene = Self::new(0);
            scene.ask(line, [first]).await;
            scene.begun(1).await;
            scene
        }

        /// On one thread each is in the line when this returns, in order, unless its line is served already.
        async fn ask(&mut self, line: char, numbers: impl IntoIterator<Item = u32>) {
            for number in numbers {
                let (together, work) = (self.together.clone(), self.work.clone());
                self.asked.spawn(async move { (number, together.ask(line, number, || work).await) });
                tokio::task::yield_now().await;
            }
        }

        async fn answers(&mut self) -> Vec<(u32, Option<u32>)> {
            let mut answers = std::mem::take(&mut self.asked).join_all().await;
            answers.sort_unstable();
            answers
        }

        fn batches(&self) -> Vec<(char, usize)> {
            self.work.batches.lock().unwrap().clone()
        }

        async fn begun(&self, batches: usize) {
            soon(|| self.batches().len() == batches).await;
        }
    }

    async fn soon(condition: impl Fn() -> bool) {
        let holds = async {
            while !condition() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), holds).await.unwrap();
    }

    fn doubled(numbers: impl IntoIterator<Item = u32>) -> Vec<(u32, Option<u32>)> {
        numbers.into_iter().map(|number| (number, Some(number * 2))).collect()
    }

    #[tokio::test]
    async fn those_that_come_while_some_are_served_go_together_and_at_most_so_many() {
        let mut scene = Scene::serving('a', 0).await;
        scene.ask('a', 1..10).await;
        scene.work.permits.add_permits(4);
        assert_eq!(scene.answers().await, doubled(0..10));
        assert_eq!(scene.batches(), [('a', 1), ('a', 4), ('a', 4), ('a', 1)]);
        soon(|| scene.together.lines().is_empty()).await;
        scene.work.permits.add_permits(1);
        scene.ask('a', [7]).await;
        assert_eq!(scene.answers().await, doubled([7]), "served anew");
    }

    #[tokio::test]
    async fn who_is_about_to_ask_comes_along() {
        let mut scene = Scene::serving('a', 1).await;
        scene.ask('a', [2]).await;
        // the first one's work goes on before these two have asked
        scene.work.permits.add_permits(4);
        for number in [3, 4] {
            let (together, work) = (scene.together.clone(), scene.work.clone());
            scene.asked.spawn(async move { (number, together.ask('a', number, || work).await) });
        }
        assert_eq!(scene.answers().await, doubled(1..5));
        assert_eq!(scene.batches(), [('a', 1), ('a', 3)]);
    }

    #[tokio::test]
    async fn a_line_does_not_wait_for_another() {
        let mut scene = Scene::serving('a', 1).await;
        scene.ask('a', [2]).await;
        scene.ask('b', [3]).await;
        scene.begun(2).await;
        assert_eq!(scene.batches(), [('a', 1), ('b', 1)]);
        scene.work.permits.add_permits(3);
        assert_eq!(scene.answers().await, doubled(1..4));
    }

    #[tokio::test]
    async fn who_asks_is_served_though_the_one_who_began_is_gone() {
        let mut scene = Scene::new(0);
        scene.ask('a', [1]).await;
        scene.asked.shutdown().await;
        scene.ask('a', [2]).await;
        scene.work.permits.add_permits(2);
        assert_eq!(scene.answers().await, doubled([2]));
        assert_eq!(scene.work.served.load(Ordering::Relaxed), 2, "whose asker is gone is served all the same");
    }

    #[tokio::test]
    async fn everybody_learns_of_a_panic_and_the_next_one_is_served() {
        let mut scene = Scene::new(0);
        scene.ask('a', [1, 2, PANICS, 3, 4, 5]).await;
        scene.work.permits.add_permits(2);
        let told = [(1, Some(2)), (2, Some(4)), (3, None), (4, None), (5, None), (PANICS, None)];
        assert_eq!(scene.answers().await, told, "in its batch, and behind it");
        assert!(scene.together.lines().is_empty(), "a line stays behind");
        scene.ask('a', [6]).await;
        scene.work.permits.add_permits(1);
        assert_eq!(scene.answers().await, doubled([6]));
    }

    #[tokio::test]
    async fn who_is_dropped_without_an_answer_learns_that_there_is_none() {
        let mut scene = Scene::new(0);
        scene.ask('a', [1, UNANSWERED, 2]).await;
        scene.work.permits.add_permits(2);
        assert_eq!(scene.answers().await, [(1, Some(2)), (2, Some(4)), (UNANSWERED, None)]);
    }

    /// Ends at once, or never.
    struct Ending;

    impl Serve for Ending {
        type Line = ();
        type Item = bool;
        type Answer = ();

        const MOST: usize = 1;
        const PATIENCE: Duration = Duration::from_millis(20);

        async fn serve(&mut self, (): &(), batch: Vec<Waiting<Self>>) {
            for Waiting { item: ends, answer } in batch {
                if !ends {
                    std::future::pending().await
                }
                let _ = answer.send(());
            }
        }
    }

    #[tokio::test]
    async fn work_that_never_ends_holds_nobody_up_for_ever() {
        let together = Together::default();
        let ask = |ends| together.ask((), ends, || Ending);
        assert_eq!(tokio::join!(ask(true), ask(false), ask(true)), (Some(()), None, Some(())));
        soon(|| together.lines().is_empty()).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn nobody_is_forgotten_whenever_they_come() {
        let scene = Scene::new(usize::MAX >> 4);
        let mut asked = JoinSet::new();
        for task in 0..8 {
            let (together, work) = (scene.together.clone(), scene.work.clone());
            asked.spawn(async move {
                for number in 0..500 {
                    let line = if (number + task) % 3 == 0 { 'a' } else { 'b' };
                    let number = number % PANICS;
                    assert_eq!(together.ask(line, number, || work.clone()).await, Some(number * 2));
                }
            });
        }
        asked.join_all().await;
        assert_eq!(scene.work.served.load(Ordering::Relaxed), 4_000);
        let served: usize = scene.batches().iter().map(|(_, size)| size).sum();
        assert_eq!(served, 4_000);
    }
}
