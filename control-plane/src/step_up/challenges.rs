//! Challenges: asked, answered, and the token taken, each once.

use cvault_types::portal::{Challenge, ChallengeToken, StepUpAnswer, StepUpMethod};
use cvault_types::{ChallengeId, ErrorCode};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::json;
use time::Duration;
use uuid::Uuid;

use crate::app::App;
use crate::audit;
use crate::auth::events::{self, AdminEvent, AuthKind, Outcome};
use crate::auth::opaque;
use crate::auth::passwords::{Party, PasswordError};
use crate::db::DbError;
use crate::http::{Portal, Problem};
use crate::portal::sessions::{self, End, Seen};
use crate::portal::{accounts, attempts};
use crate::tenancy::TenantTx;

use super::risk::MAX_CHALLENGE_FAILURES;

/// To find one's password.
const LIFETIME: Duration = Duration::minutes(5);
/// To send the request again, which a program does at once.
const TOKEN_SECONDS: u32 = 60;

#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error("there is no such open challenge of this session")]
    NotFound,
    #[error("the answer is wrong")]
    Wrong,
    #[error("the answer is wrong once too often, and the session has ended")]
    Terminated,
    #[error("the account is guessed at too often")]
    Limited(Problem),
    #[error(transparent)]
    Password(#[from] PasswordError),
    #[error(transparent)]
    Db(#[from] DbError),
}

pub(super) async fn create(
    tx: &mut TenantTx,
    app: &App,
    portal: &Portal,
    action: &'static str,
    digest: &[u8; 32],
) -> Result<Challenge, DbError> {
    let id = ChallengeId::from_uuid(Uuid::now_v7());
    let expires_at = app.clock.now() + LIFETIME;
    sqlx::query!(
        "insert into cvault.step_up_challenges (tenant_id, challenge_id, session_id, action, request_digest, expires_at)
         values ($1, $2, $3, $4, $5, $6)",
        portal.tenant.uuid(),
        id.uuid(),
        portal.session,
        action,
        digest.as_slice(),
        expires_at
    )
    .execute(tx.conn())
    .await?;
    Ok(Challenge {
        id,
        action: action.to_owned(),
        methods: vec![StepUpMethod::Password],
        expires_at,
        // relative: the portal may be behind another name
        verify_url: format!("/api/v1/tenant/step-up/{id}/verify"),
    })
}

/// Whether `token` answers for exactly this request of this session; then it is used up.
pub(super) async fn take(
    tx: &mut TenantTx,
    app: &App,
    portal: &Portal,
    action: &'static str,
    token: &str,
    digest: &[u8; 32],
) -> Result<bool, DbError> {
    if !opaque::CHALLENGE_TOKEN.is_well_formed(token) {
        return Ok(false);
    }
    let hash = app.secrets.peppered("challenge_token", token);
    let taken = sqlx::query!(
        "update cvault.step_up_challenges set used_at = $6
         where tenant_id = $1 and session_id = $2 and token_hash = $3 and request_digest = $4 and action = $5
           and used_at is null and token_expires_at > $6",
        portal.tenant.uuid(),
        portal.session,
        hash.as_slice(),
        digest.as_slice(),
        action,
        app.clock.now()
    )
    .execute(tx.conn())
    .await?;
    Ok(taken.rows_affected() == 1)
}

/// Answers a challenge of the caller's session. A right answer also makes the request's network and program the session's
/// own; so many wrong ones in a row end the session.
///
/// # Errors
/// See [`VerifyError`].
pub async fn verify(
    app: &App,
    portal: &Portal,
    challenge: ChallengeId,
    answer: StepUpAnswer,
    seen: &Seen,
) -> Result<ChallengeToken, VerifyError> {
    let mut tx = app.db.tenancy.begin(portal.tenant).await?;
    let open = is_open(&mut tx, app, portal, challenge).await?;
    let account = accounts::load(&mut tx, portal.admin).await?;
    tx.commit().await?;
    let (true, Some(account)) = (open, account) else { return Err(VerifyError::NotFound) };
    let StepUpAnswer::Password { password } = answer;
    let guessed = attempts::account(&account.email);
    app.throttles.guess(guessed).map_err(VerifyError::Limited)?;
    // no transaction is open while this takes its fifth of a second
    let right = app.passwords.verify(Party::Tenant(portal.tenant), password, account.password_hash).await;
    if !matches!(right, Ok(false)) {
        app.throttles.no_guess(guessed);
    }
    let mut tx = app.db.tenancy.begin(portal.tenant).await?;
    if right? {
        let token = answered(&mut tx, app, portal, challenge, seen).await?;
        tx.commit().await?;
        return token.ok_or(VerifyError::NotFound);
    }
    let failure = failed(&mut tx, app, portal, challenge, seen).await?;
    tx.commit().await?;
    Err(failure)
}

async fn is_open(tx: &mut TenantTx, app: &App, portal: &Portal, challenge: ChallengeId) -> Result<bool, DbError> {
    Ok(sqlx::query_scalar!(
        r#"select exists (select from cvault.step_up_challenges where tenant_id = $1 and challenge_id = $2
               and session_id = $3 and token_hash is null and expires_at > $4) as "open!""#,
        portal.tenant.uuid(),
        challenge.uuid(),
        portal.session,
        app.clock.now()
    )
    .fetch_one(tx.conn())
    .await?)
}

/// `None`: somebody else has answered it meanwhile.
async fn answered(
    tx: &mut TenantTx,
    app: &App,
    portal: &Portal,
    challenge: ChallengeId,
    seen: &Seen,
) -> Result<Option<ChallengeToken>, DbError> {
    let now = app.clock.now();
    let session = sqlx::query!(
        "update cvault.portal_sessions set challenge_failures = 0, user_agent = $3
         where tenant_id = $1 and session_id = $2 and ended_at is null",
        portal.tenant.uuid(),
        portal.session,
        seen.user_agent
    )
    .execute(tx.conn())
    .await?;
    let token = opaque::CHALLENGE_TOKEN.draw(&mut StdRng::from_os_rng());
    let hash = app.secrets.peppered("challenge_token", token.expose());
    let updated = sqlx::query!(
        "update cvault.step_up_challenges set token_hash = $4, token_expires_at = $5
         where tenant_id = $1 and challenge_id = $2 and session_id = $3 and token_hash is null",
        portal.tenant.uuid(),
        challenge.uuid(),
        portal.session,
        hash.as_slice(),
        now + Duration::seconds(i64::from(TOKEN_SECONDS))
    )
    .execute(tx.conn())
    .await?;
    if session.rows_affected() == 0 || updated.rows_affected() == 0 {
        return Ok(None);
    }
    sessions::know_network(tx, portal.admin, seen, now).await?;
    note(tx, portal, challenge, seen, Outcome::Success).await?;
    Ok(Some(ChallengeToken { challenge_token: token, expires_in_seconds: u64::from(TOKEN_SECONDS) }))
}

async fn failed(
    tx: &mut TenantTx,
    app: &App,
    portal: &Portal,
    challenge: ChallengeId,
    seen: &Seen,
) -> Result<VerifyError, DbError> {
    let failures = sqlx::query_scalar!(
        "update cvault.portal_sessions set challenge_failures = challenge_failures + 1
         where tenant_id = $1 and session_id = $2 returning challenge_failures",
        portal.tenant.uuid(),
        portal.session
    )
    .fetch_one(tx.conn())
    .await?;
    note(tx, portal, challenge, seen, Outcome::Failure).await?;
    if u32::try_from(failures).unwrap_or(u32::MAX) < MAX_CHALLENGE_FAILURES {
        return Ok(VerifyError::Wrong);
    }
    sessions::end(tx, portal.session, End::Risk, app.clock.now()).await?;
    Ok(VerifyError::Terminated)
}

async fn note(
    tx: &mut TenantTx,
    portal: &Portal,
    challenge: ChallengeId,
    seen: &Seen,
    outcome: Outcome,
) -> Result<(), DbError> {
    let event = AdminEvent {
        kind: AuthKind::PortalStepUp,
        outcome,
        admin: Some(portal.admin),
        client_ip: seen.ip,
        request_id: portal.request_id,
    };
    events::record_admin(tx, event).await?;
    let (actor, target) = (portal.actor(), challenge.to_string());
    let action = if matches!(outcome, Outcome::Success) { "step_up.verify" } else { "step_up.fail" };
    let entry = audit::Entry {
        actor: &actor,
        action,
        target: &target,
        details: json!({}),
        request_id: Some(portal.request_id),
    };
    audit::record(tx, entry).await
}

impl From<VerifyError> for Problem {
    fn from(error: VerifyError) -> Self {
        match error {
            VerifyError::NotFound => Self::new(ErrorCode::NotFound)
                .detail("There is no open challenge of this id in this session. Send the request again for a new one."),
            VerifyError::Wrong => Self::new(ErrorCode::InvalidCredentials).detail("The password is wrong."),
            VerifyError::Terminated => Self::new(ErrorCode::SessionTerminated)
                .detail("The challenge was answered wrongly too often. Log in again."),
            VerifyError::Limited(problem) => problem,
            VerifyError::Password(error) => error.into(),
            VerifyError::Db(error) => error.into(),
        }
    }
}
